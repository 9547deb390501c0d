"""Verifiers that misbehave, by dotted name."""

import os
import sys
import time


def sleeps(answer, response_token_ids, response_text):
    if answer == "sleep":
        time.sleep(10_000)
    return 1.0


def misbehaves(answer, response_token_ids, response_text):
    if answer == "raise":
        raise RuntimeError("a verifier's own mistake")
    if answer == "binary":
        sys.stdout.buffer.write(bytes(range(256)) * 100)
        sys.stdout.flush()
        os.write(1, b"\x00\xff\n" * 1000)
    if answer == "exit":
        os._exit(3)
    if answer == "nan":
        return float("nan")
    if answer == "text":
        return "1.0"
    return 1.0
