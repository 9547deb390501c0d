"""Response lengths by name: the published distributions, short forms for parametric ones, and files of a user's own lengths.

    load_lengths("dapo-32b-early")                       a name of PUBLISHED
    load_lengths("lognormal:mean=900,p99=8000")          or median=, sigma=; every form takes cap= and rho= too
    load_lengths("constant:512")
    load_lengths("twopoint:short=500,share=0.05")        500 tokens, or the cap with probability 0.05
    load_lengths("mine.jsonl")                           or .csv, .npy, .txt: one response a line
    load_lengths("runs/mine")                            a run's folder: its responses.csv

What a distribution is, samples and sums up to: distributions.py.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sim.clock.distributions import MAX_CAP, Constant, Empirical, Growth, Lengths, LogNormal, Mixture, PercentileTable, TwoPoint
from sim.clock.fitted import growing_to, log_normal
from sim.clock.run_lengths import of_run

__all__ = [
    "DAPO_MEANS", "DEFAULT_CAP", "PUBLISHED", "Constant", "Empirical", "Growth", "Lengths", "LogNormal", "Mixture",
    "PercentileTable", "TwoPoint", "growing_to", "load_lengths", "log_normal", "prompt_lengths", "read_lengths",
]  # fmt: skip

DEFAULT_CAP = 24_576  # tokens; of the short forms: the longest response of T-PPO's setup [P]
FIELDS = ("length", "tokens", "response_length", "response_tokens", "num_tokens")
SUFFIXES = (".jsonl", ".csv", ".npy", ".txt")

DAPO_MEANS: dict[float, float] = {0: 742.0, 1024: 1501.0, 2049: 2586.0, 3073: 3840.0, 4177: 4311.0, 5280: 4536.0}
"""Mean response length over a DAPO run of Qwen2.5-32B: gradient step -> tokens [V, read off a figure]."""


# Published distributions. Group correlations are [V] 0.05 early and 0.92 in the long-CoT regime; which trace has which is [I].

_DAPO_EARLY = PercentileTable(
    percentiles_upward=((0.5, 466), (0.75, 695), (0.9, 1039), (0.95, 1418), (0.99, 2710), (4607.7 / 4608.4, 10112)),
    lower_stretch=1.245466,
    cap=20_480,
    correlation=0.05,
    source="Qwen2.5-32B in DAPO's first steps, 4,608 responses, mean 581 [V]. The longest, 10,112, stands at the median rank of a "
    "maximum, (n - 0.3) / (n + 0.4) [I]; the lower half is stretched by 1.25 to meet the mean [I].",
)
_DAPO_GROWTH = ((0, 1.277230), (1024, 2.587839), (2049, 4.484180), (3073, 6.733888), (4177, 7.599853), (5280, 8.018266))


def _math_mixture() -> Mixture:
    """Log-normal components with one coefficient of variation c, which the published total variance gives:

    c^2 = (sd^2 - sum w (m - mean)^2) / sum w m^2,        mean = sum w m = 9,569,   c = 0.355,   log-sigma^2 = log(1 + c^2)
    """
    means, weights = np.array([4959.0, 12720.0, 9175.0, 17655.0]), np.array([0.359, 0.074, 0.373, 0.194])
    variance_between = weights @ (means - weights @ means) ** 2
    sigma = math.sqrt(math.log1p((5943.0**2 - variance_between) / (weights @ means**2)))
    return Mixture(
        components=tuple(log_normal(mean=float(mean), sigma=sigma, cap=32_768) for mean in means),
        weights=tuple(weights.tolist()),
        cap=32_768,
        name="math-mixture",
        source="385,024 answers to math problems: mean 9,575, sd 5,943, means and weights of four components [V]. Their spreads "
        "were not published: log-normals with one coefficient of variation, 0.355, from the total variance [I]. No cap was "
        "published either; 32,768 cuts 0.5 % and leaves a mean of 9,545 and an sd of 5,831 [O].",
    )


PUBLISHED: dict[str, Lengths] = {
    "dapo-32b-early": dataclasses.replace(_DAPO_EARLY, name="dapo-32b-early"),
    "dapo-32b": dataclasses.replace(
        _DAPO_EARLY,
        growth=Growth(factors=_DAPO_GROWTH),
        name="dapo-32b",
        source=f"dapo-32b-early ({_DAPO_EARLY.source}), growing so that its mean follows DAPO_MEANS [V, read off a figure]; that "
        "the shape in log-length stays is [I]. The curve starts at 742, the trace of the first steps has 581: both as published.",
    ),
    "code-14b": PercentileTable(
        percentiles_upward=((0.5, 9900), (0.75, 14290), (0.85, 16000)),
        lower_stretch=2.183520,
        cap=16_000,
        correlation=0.92,
        name="code-14b",
        source="a 14B model with long chains of thought on code, 640 responses in RL steps, mean 9,382, 15 % at the cap of 16,000 "
        "[V]; the lower half is stretched by 2.18 to meet the mean [I]. What a higher cap would show is extrapolated.",
    ),
    "math-14b": PercentileTable(
        percentiles_upward=((0.5, 661), (0.75, 1129), (0.9, 2566), (0.95, 4101), (0.99, 16000)),
        cap=16_000,
        name="math-14b",
        source="a 14B model on math under GRPO, about 1 % at the cap of 16k [V, read off a figure]. No mean was published: the "
        "lower half mirrors the upper [I].",
    ),
    "math-mixture": _math_mixture(),
}
"""Published distributions by name. `source` says what was published and what is ours, with the marks of docs/config.md."""


# By name, form or file


def load_lengths(
    spec: str | os.PathLike[str], cap: int | None = None, *, correlation: float | None = None, field: str | None = None,
    clip: bool = False,
) -> Lengths:  # fmt: skip
    """A distribution from a published name, a short form or a file; see the module's docstring.

    cap          tokens; None: what the spec says, else a published distribution's own, a file's longest response, DEFAULT_CAP.
    correlation  of the answers to one prompt; None: what the spec says, else a published distribution's own, else 0.
    field, clip  files only: see `read_lengths`; with `clip`, lengths above `cap` count as `cap` instead of being an error.
    Raises ValueError for an unknown name (with the nearest one), a file that cannot be used, and lengths above the cap.
    """
    text = os.fspath(spec)
    form, colon, options = text.partition(":")
    if text in PUBLISHED:
        lengths = PUBLISHED[text] if cap is None else dataclasses.replace(PUBLISHED[text], cap=cap)
    elif Path(text).is_dir():
        lengths = of_run(Path(text), cap)
    elif Path(text).suffix.lower() in SUFFIXES or Path(text).is_file():
        lengths = _from_file(Path(text), cap, field, clip)
    elif colon and form in FORMS:
        lengths = _from_form(form, options, cap)
    else:
        known = [*PUBLISHED, *(f"{name}:" for name in FORMS)]
        close = difflib.get_close_matches(text.partition(":")[0], known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"lengths: got {text!r}; expected one of {', '.join(known)}, a file ({', '.join(SUFFIXES)}) or a run's folder{hint}"
        )
    return lengths if correlation is None else dataclasses.replace(lengths, correlation=correlation)


def prompt_lengths(lengths: Lengths | str | int) -> Lengths:
    """Prompt lengths: one number of tokens for all prompts, or any distribution or spec of one."""
    if isinstance(lengths, Lengths):
        return lengths
    if isinstance(lengths, int):
        return Constant(value=lengths, cap=max(lengths, 1), name=f"constant:{lengths}", source="[O]")
    return load_lengths(lengths)


def _constant(cap: int | None, tokens: float) -> Lengths:
    if cap is None:
        cap = math.ceil(tokens) if 0 < tokens < math.inf else DEFAULT_CAP  # what is neither is refused below
    return Constant(value=tokens, cap=cap)


def _two_point(cap: int | None, short: float, share: float) -> Lengths:
    return TwoPoint(short=short, long_share=share, cap=DEFAULT_CAP if cap is None else cap)


def _log_normal(cap: int | None, **options: float) -> Lengths:
    return log_normal(cap=DEFAULT_CAP if cap is None else cap, **options)


FORMS: dict[str, tuple[Callable[..., Lengths], tuple[str, ...], str]] = {
    "constant": (_constant, ("tokens",), "constant:512"),
    "twopoint": (_two_point, ("short", "share"), "twopoint:short=500,share=0.05"),
    "lognormal": (_log_normal, ("mean", "median", "p99", "sigma"), "lognormal:mean=900,p99=8000"),
}
"""Short forms: builder, names of its options (a bare number is the first), an example."""


def _from_form(form: str, text: str, cap: int | None) -> Lengths:
    build, names, example = FORMS[form]
    options: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.strip().partition("=")
        key, value = (key.strip(), value) if equals else (names[0], key)
        if key not in (*names, "cap", "rho") or key in options:
            raise ValueError(f"lengths: got {form}:{text}; expected {', '.join(names)}, cap or rho, each once, as in {example}")
        try:
            options[key] = float(value)
        except ValueError:
            raise ValueError(f"lengths: got {form}:{text}; expected a number for {key}, got {value!r}") from None
    rho, own_cap = options.pop("rho", 0.0), options.pop("cap", None)
    if own_cap is not None and not own_cap.is_integer():
        raise ValueError(f"cap: got {own_cap:g}; expected a whole number of tokens, 1 or more")
    cap = cap if cap is not None or own_cap is None else int(own_cap)
    missing = [name for name in names if name not in options] if form != "lognormal" else []
    if missing:
        raise ValueError(f"lengths: got {form}:{text}, without {' and '.join(missing)}; expected for example {example}")
    return dataclasses.replace(build(cap, **options), correlation=rho, name=f"{form}:{text}", source="[O]")


# Files


def _from_file(path: Path, cap: int | None, field: str | None, clip: bool) -> Lengths:
    values = read_lengths(path, field=field)
    longest, num_clipped = max(values), 0
    if cap is not None and longest > cap:
        if not clip:
            raise ValueError(f"{path}: got a length of {longest}; expected at most the cap of {cap}; raise it, or pass clip=True")
        num_clipped = sum(value > cap for value in values)
        values = [min(value, cap) for value in values]
    return Empirical(
        values=tuple(values), cap=longest if cap is None else cap, num_clipped=num_clipped, name=path.name, source=str(path)
    )


def read_lengths(path: str | os.PathLike[str], *, field: str | None = None) -> list[int]:
    """Lengths in tokens from a file, in its order.

    .jsonl  a number per line, or an object with `field` (by default the first of FIELDS that it has)
    .csv    the column `field` (by default the only one, or the first of FIELDS); a header is needed where there are several columns
    .npy    a one-dimensional array, no pickled objects
    .txt    numbers, separated by white space
    Raises ValueError, naming file and place, for no lengths, and for one that is not a whole, positive, finite number.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".npy": _read_npy, ".txt": _read_txt}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: got the ending {path.suffix!r}; expected one of {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        found = [(where, _whole(where, value)) for where, value in readers[path.suffix.lower()](path, field)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not readable as {path.suffix}: {error}") from None
    if not found:
        raise ValueError(f"{path}: got no length; expected one or more")
    return [value for _, value in found]


def _whole(where: str, value: Any) -> int:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (number.is_integer() and 1 <= number <= MAX_CAP):
        raise ValueError(f"{where}: got {value!r}; expected a length in tokens: a whole number, 1 to {MAX_CAP:,}")
    return int(number)


def _read_jsonl(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg}") from None
        if isinstance(value, dict):
            value = value[_pick(where, field, list(value))]
        yield where, value


def _read_csv(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if any(cell.strip() for cell in row)]
    if not rows:
        return
    header = [cell.strip() for cell in rows[0][1]]
    column = 0
    if field is not None or len(header) > 1 or not _is_number(header[0]):
        column = 0 if field is None and len(header) == 1 else header.index(_pick(f"{path}, header", field, header))
        rows = rows[1:]
    for number, row in rows:
        yield f"{path}, line {number}", row[column] if column < len(row) else ""


def _read_npy(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not an array of numbers: {error}") from None
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind not in "iuf":
        kind = f"an array of {values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: got {kind}; expected numbers in one dimension")
    yield from ((f"{path}, element {index}", value) for index, value in enumerate(values.tolist()))


def _read_txt(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        yield from ((f"{path}, line {number}", word) for word in line.split())


def _pick(where: str, field: str | None, names: list[str]) -> str:
    """The named field, or the first known one."""
    for name in FIELDS if field is None else (field,):
        if name in names:
            return name
    wanted = f"the field {field!r}" if field is not None else f"one of {', '.join(FIELDS)}"
    raise ValueError(f"{where}: got the fields {', '.join(map(repr, names))}; expected {wanted}; name it with `field`")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
