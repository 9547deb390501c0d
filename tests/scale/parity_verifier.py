"""A verifier of the user's own: about half of the responses are right, whatever the model, so that every metric has something to say."""


def verify(answer, response_token_ids, response_text):
    return 1.0 if sum(response_token_ids) % 2 == 0 else -1.0
