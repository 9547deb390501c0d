"""Inputs that are bad by construction, as Hypothesis strategies, one per kind: what `benchmarks.fuzz` feeds to the commands."""

from __future__ import annotations

import dataclasses
import json
import math
import string
import typing

from hypothesis import strategies as st

from tppo_ref.loop.bounds import bounds_of
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import field_paths, get_field


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line, and the files that it finds in its folder; None is a named pipe."""

    argv: tuple[str, ...]
    files: tuple[tuple[str, bytes | None], ...] = ()
    damage: tuple[str, str, int] | None = None  # of a good run: a file of its checkpoint, how it is damaged, where


JSONL = (
    "--task.name", "jsonl", "--task.path", "p.jsonl", "--task.tokenizer", "bytes", "--model.policy", "m.json", "--run.steps", "1",
    "--rollout.slots", "2", "--rollout.window", "4", "--rollout.max_response_tokens", "8", "--run.eval_prompts", "1",
)  # fmt: skip
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}
PROMPTS = b"".join(b'{"prompt": "%d + 1", "answer": "%d"}\n' % (i, i + 1) for i in range(4))
FILES = {"p.jsonl": PROMPTS, "m.json": json.dumps(SHAPE).encode()}


def train(*argv: str, **files: bytes | None) -> Case:
    """`tppo train` on good prompts and a good shape, but for what is given otherwise."""
    given = {name.replace("_", "."): content for name, content in files.items()}
    return Case(("train", *JSONL, *argv), tuple((FILES | given).items()))


# ---------------------------------------------------------------------------------------------------------------- the six kinds

WORD = st.text(string.ascii_lowercase, min_size=1, max_size=8).map(lambda text: f"x@{text}")  # no number, no word of YAML's
HUGE = st.sampled_from([1e13, 1e20, 1e300, math.inf, -math.inf, math.nan, -1e20])


@st.composite
def fields(draw: st.DrawFn) -> Case:
    """A field outside of its bounds, of another type, or of a name that there is not."""
    path = draw(st.sampled_from([path for path in field_paths(Config) if not path.startswith("compare.")]))
    section, name = path.split(".")
    hint = typing.get_type_hints(type(getattr(Config(), section)), include_extras=True)[name]
    bounds, kind = bounds_of(hint), draw(st.integers(0, 3))
    if kind == 0 or (bounds is None and isinstance(get_field(Config(), path), str | None)):
        cut = draw(st.integers(0, len(path) - 1))
        wrong = path[:cut] + draw(WORD) + path[cut + draw(st.integers(0, 2)) :]
        return train(f"--{wrong}", "1")
    if kind == 1 or bounds is None:
        return train(f"--{path}", draw(WORD | st.sampled_from(["[1]", "{a: 1}", "[", "1 2", "0x", "--", "\x00"])))
    number = draw(HUGE)
    if kind == 2 and bounds.low > -math.inf:
        number = bounds.low - draw(st.integers(1, 10**6))
    return train(f"--{path}", str(int(number) if math.isfinite(number) and "int" in str(hint) else number))


@st.composite
def yaml_files(draw: st.DrawFn) -> Case:
    """A configuration file that is no YAML, or says what no configuration says."""
    section, name = draw(st.sampled_from([path for path in field_paths(Config) if not path.startswith("compare.")])).split(".")
    word, depth = draw(WORD), draw(st.integers(30, 20_000))
    texts = [
        f"{section}: {{{name}: 1, {name}: 2}}\n",
        f"{section}: {{}}\n{section}: {{}}\n",
        f"{section}:\n\t{name}: 1\n",
        f"{section}: [{word}\n",
        f"{section}: '{word}'\n",
        f"- {section}\n",
        f"'{word}': {{{name}: 1}}\n",
        f"{section}: {{'{word}': 1}}\n",
        "[" * depth,
        f"{section}: " + "{a: " * depth,
        f"{section}: !!python/object/apply:os.system ['{word}']\n",
        f"{section}: &a {{{name}: 1}}\nrun: *a\n",
        f"{section}: !x{word[2:]} {{}}\n",
        f"{section}: {{{name}: {{'{word}': [1, {{}}]}}}}\n",
        f"%{word}\n{section}\n",
        "",
        "3\n",
        f"{section}: 3\n",
        f"{section}: \x07\n",
    ]
    content = draw(st.sampled_from(texts).map(str.encode) | st.binary(min_size=1, max_size=20).map(lambda junk: b"\xff" + junk))
    return train("--config", "mine.yaml", mine_yaml=content)


@st.composite
def prompt_files(draw: st.DrawFn) -> Case:
    """Good lines around one that is not, or no file of lines at all."""
    word = draw(WORD)
    whole = json.dumps({"prompt": word, "answer": "1"})
    bad = draw(
        st.sampled_from(
            [
                whole[: draw(st.integers(1, len(whole) - 1))],
                "3",
                "[]",
                "null",
                f'"{word}"',
                "{}",
                f'{{"prompt": "{word}"}}',
                '{"answer": "1"}',
                whole[:-1] + ', "answer": "2"}',
                whole[:-1] + f', "question": "{word}"}}',
                '{"prompt": "", "answer": "1"}',
                '{"prompt": " \\n", "answer": "1"}',
                f'{{"prompt": "{word}", "answer": ""}}',
                '{"prompt": "\\ud800", "answer": "1"}',
                '{"prompt": "#### 7", "answer": "1"}',
                *(
                    f'{{"prompt": "{word}", "answer": {x}}}'
                    for x in ("NaN", "Infinity", "-Infinity", "1e999", "null", "true", "[1]", "{}")
                ),
                *(f'{{"prompt": {x}, "answer": "1"}}' for x in ("1", "null", "[1]", "{}")),
                f'{{"prompt": "{word * 200}", "answer": "1"}}',
                "[" * draw(st.integers(1000, 20_000)),
                f'{{"id": 1, {whole[1:]}\n{{"id": 1, {whole[1:]}',
            ]
        ).map(str.encode)
        | st.binary(max_size=9).map(lambda junk: b'{"prompt": "\xff' + junk)
    )
    lines = PROMPTS.splitlines()
    lines.insert(draw(st.integers(0, len(lines))), bad)
    file = draw(st.sampled_from([b"\n".join(lines)] * 8 + [b"", b"\n \n", None, PROMPTS[: PROMPTS.index(b"\n")]]))
    return train(p_jsonl=file)


@st.composite
def shapes(draw: st.DrawFn) -> Case:
    """A config.json of a model that is torn, or describes none."""
    text = json.dumps(SHAPE)
    if draw(st.integers(0, 4)) == 0:
        torn = [text[: draw(st.integers(0, len(text) - 1))], "[" * 9999, "[]", "3", text[:-1] + ', "vocab_size": 260}']
        return train(m_json=draw(st.sampled_from(torn)).encode())
    if draw(st.integers(0, 5)) == 0:
        return train(m_json=None)
    name = draw(st.sampled_from([name for name in SHAPE if name != "eos_token_id"]))
    wrong = draw(st.sampled_from([0, -1, -(10**9), 10**9, 10**15, 1.5, "x", "", [], {}, [1], math.nan, math.inf]))
    if name == "model_type" and isinstance(wrong, str):
        wrong = draw(WORD)
    if name == "max_position_embeddings" and isinstance(wrong, int) and wrong > 0:
        wrong = draw(st.integers(1, 8))
    return train(m_json=json.dumps(SHAPE | {name: wrong}).encode())


@st.composite
def checkpoints(draw: st.DrawFn) -> Case:
    """A good run of which one file of the checkpoint is not as it was written. (Its config.json comes back from the checkpoint.)"""
    names = [
        "manifest.json",
        "state.json",
        "optimisers.pt",
        "policy/model.safetensors",
        "value/model.safetensors",
        "policy/config.json",
    ]
    how, place = draw(st.sampled_from(["torn", "flipped", "removed", "junk", "empty"])), draw(st.integers(0, 10**6))
    name = draw(st.sampled_from(names))
    if name == "manifest.json" and how == "flipped":  # a byte of white space, or of a number, may mean the same
        how = "torn"
    return Case(("resume", "good", "--run.steps", "3"), damage=(name, how, place))


MODULES = {
    "raises": "raise RuntimeError('{word}')",
    "leaves": "import sys\nsys.exit(3)",
    "dies": "import os\nos._exit(7)",
    "syntax": "def verify(:",
    "empty": "",
    "number": "verify = 3",
    "none": "verify = None",
    "loops": "import {name}\n{name}.verify",
    "closes": "import os\nos.close(1)\nverify = 3",
    "lacks": "import {word}_",
    "binary": "\x00",
}


@st.composite
def verifiers(draw: st.DrawFn) -> Case:
    """A verifier that is not there, cannot be imported, or is no function."""
    word = draw(st.text(string.ascii_lowercase, min_size=3, max_size=8))
    if draw(st.booleans()):
        names = [
            word,
            f"{word}:",
            f":{word}",
            f"zz{word}:verify",
            f"tppo_ref.tasks.chain:{word}_",
            f"tppo_ref.tasks.chain:verify.{word}",
            "::",
            "",
            f"tppo_ref.{word}_:verify",
            f"../{word}:verify",
            f"tppo_ref.tasks.chain:verify:{word}",
            "math:pi",
            "\x00:verify",
        ]
        return train("--task.verifier", draw(st.sampled_from(names)))
    kind, name = draw(st.sampled_from(sorted(MODULES))), f"fuzz_{word}"
    content = MODULES[kind].replace("{word}", word).replace("{name}", name)
    return train("--task.verifier", f"{name}:verify", **{f"{name}__py": content.encode()})
