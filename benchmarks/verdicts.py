"""scale's verifier on math-verify's own examples: how many right ones it takes, how many wrong ones it refuses.

    pip download --no-deps --no-binary :all: math-verify==0.9.0 && tar xzf math_verify-0.9.0.tar.gz
    python -m benchmarks.verdicts math_verify-0.9.0/tests

The examples are the literal tuples (gold, prediction, verdict, ...) of the tests in its source archive; nothing of them is run.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scale.rewards import verify_math


def examples(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """(gold, prediction, whether it is right) of every literal tuple of that form in the folder's Python files."""
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Tuple):
                try:
                    gold, prediction, *rest = ast.literal_eval(node)
                except (ValueError, TypeError):
                    continue
                verdicts = [x for x in rest if isinstance(x, int)]
                if isinstance(gold, str) and isinstance(prediction, str) and verdicts:
                    yield gold, prediction, bool(verdicts[0])


def accepts(gold: str, prediction: str) -> bool:
    try:
        return verify_math(gold, [], prediction) > 0
    except ValueError:
        return False


def main(folder: Path) -> None:
    logging.disable(logging.CRITICAL)
    counts: Counter[tuple[bool, bool]] = Counter()
    for gold, prediction, right in examples(folder):
        taken = accepts(gold, prediction)
        counts[right, taken] += 1
        if taken != right:
            print(f"{'refused' if right else 'accepted'}: {gold[-60:]!r} against {prediction[-60:]!r}")
    print(f"right and accepted: {counts[True, True]} of {counts[True, True] + counts[True, False]}")
    print(f"wrong and refused: {counts[False, False]} of {counts[False, True] + counts[False, False]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
