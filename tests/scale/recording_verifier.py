"""A verifier that writes down what it is asked: the tokens of every response that ended, whole, whichever rank scored it."""

import json
import os


def record(answer, response_token_ids, response_text):
    line = json.dumps(list(response_token_ids)) + "\n"
    file = os.open(os.environ["TPPO_TEST_TOKENS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())  # one write: the verifiers of all ranks append to the same file
    os.close(file)
    return 1.0 if sum(response_token_ids) % 2 else -1.0
