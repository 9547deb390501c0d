"""scale/ defines no advantage, mask, loss or schedule of its own: its source is read for the signs of a second implementation.

The signs are those that tppo_ref's own rooms for these things show; a planted second implementation of each must be caught, and the
rooms themselves must be, were they in scale/.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "scale").rglob("*.py"))

OPERATIONS = {
    "cumsum", "flip", "logcumsumexp", "clamp", "clip", "minimum", "maximum", "where", "masked_fill", "masked_fill_", "masked_select", "tril", "triu",
    "log_softmax", "logsumexp", "cross_entropy", "nll_loss", "mse_loss", "huber_loss", "smooth_l1_loss", "kl_div", "exp", "exp_", "std", "var",
    "normalize", "whiten", "backward", "lfilter",
}  # fmt: skip
"""Of torch, numpy or a tensor: what advantages, masks and losses are made of, and nothing that moves weights around."""

ROOMS = {
    "tppo_ref.method.advantages",
    "tppo_ref.method.losses",
    "tppo_ref.method.masks",
    "tppo_ref.loop.updates",
    "tppo_ref.loop.rows",
    "tppo_ref.loop.learner",
}
"""The Trainer's own rooms: scale/ steps the Trainer and asks none of these behind its back."""

WORDS = (
    "gae",
    "advantage",
    "whiten",
    "surrogate",
    "clip_ratio",
    "policy_loss",
    "value_loss",
    "discount",
    "token_mask",
    "loss_mask",
    "response_mask",
)
NAMES = ("gamma", "lam", "lambda_", "dual_clip", "clip_low", "clip_high")
SCHEDULE = {"open_window", "finish_window", "carried", "refill_slot", "Grant", "Segment"}


def signs(tree: ast.AST) -> list[str]:
    """What in a source looks like an advantage, a mask, a loss or a schedule."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = node.name.lower()
            found += [f"def {node.name}" for word in WORDS if word in name]
            found += [f"def {node.name}" for word in ("schedule", "batcher") if name.endswith(word) or name.startswith(word)]
            bases = {ast.unparse(base).rpartition(".")[2] for base in getattr(node, "bases", [])}
            found += [
                f"class {node.name}({base})"
                for base in bases & {"SlotSchedule", "SuccessiveBatcher", "Trainer", "Learner", "PolicyRows"}
            ]
            if node.name in ("finish", "open_window") and {"now", "finished"} & {
                a.arg for a in getattr(getattr(node, "args", None), "args", [])
            }:
                found.append(f"def {node.name}")
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            found += [f"argument {a.arg}" for a in arguments if a.arg in NAMES]
        if isinstance(node, ast.Call):
            name = (
                node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            )
            if name in OPERATIONS:
                found.append(f"call {ast.unparse(node.func)}")
            if name in SCHEDULE:
                found.append(f"call {name}")
        if (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and (node.id in NAMES or any(w in node.id.lower() for w in WORDS))
        ):
            found.append(f"assigned {node.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in SCHEDULE:
            found.append(f"assigned {node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            found.append(f"from {node.module}")
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name in ROOMS]
    return found


def allowed(path: Path, sign: str) -> bool:
    """A line here needs its reason beside it."""
    # The dry run counts bytes: a backward pass over fake tensors, from a sum, with no loss and no weights.
    return path.name in ("dryrun.py", "fake_pass.py") and sign.endswith("backward")


@pytest.mark.parametrize("path", SOURCES, ids=[p.name for p in SOURCES])
def test_scale_defines_no_advantage_mask_loss_or_schedule(path):
    assert [sign for sign in signs(ast.parse(path.read_text())) if not allowed(path, sign)] == []


def test_there_is_something_to_read():
    assert {"run.py", "sharding.py", "vllm_engine.py", "distributed.py", "checkpoint.py"} <= {p.name for p in SOURCES}


PLANTED = {
    "gae by recursion": "def estimate(rewards, values, gamma, lam):\n    a = 0\n    for t in reversed(range(len(rewards))):\n        a = rewards[t] + gamma * a\n",
    "gae by cumulative sums": "def estimate(delta_BT):\n    return delta_BT.flip(1).cumsum(1).flip(1)",
    "an advantage by name": "def group_advantages(scores):\n    return scores - scores.mean()",
    "whitening": "def standard(x):\n    return (x - x.mean()) / (x.std() + 1e-8)",
    "a clipped ratio": "def f(new, old, a):\n    return -torch.min((new - old).exp() * a, (new - old).exp().clamp(0.8, 1.2) * a)",
    "a value loss": "def f(v, r):\n    return torch.nn.functional.mse_loss(v, r)",
    "a log-probability": "def f(logits, ids):\n    return logits.log_softmax(-1).gather(-1, ids)",
    "a mask": "def f(x, keep):\n    return torch.where(keep, x, 0)",
    "a tail's mask": "def tail_token_mask(lengths):\n    return [n - 8 for n in lengths]",
    "a schedule": "class WindowSchedule:\n    def open_window(self, draw):\n        self.carried = []",
    "a batcher": "class Batcher(SuccessiveBatcher):\n    pass",
    "a schedule's decision": "def go(self, schedule):\n    schedule.open_window(self.draw)",
    "an update of its own": "def f(loss):\n    loss.backward()",
    "the rooms behind the trainer's back": "from tppo_ref.method.losses import policy_loss",
    "the rooms as a module": "import tppo_ref.method.advantages as adv",
    "another trainer": "class FastTrainer(Trainer):\n    pass",
}


@pytest.mark.parametrize("source", PLANTED.values(), ids=PLANTED)
def test_a_planted_second_implementation_is_caught(source):
    assert signs(ast.parse(source))


@pytest.mark.parametrize("room", ["method/advantages", "method/losses", "method/masks", "loop/updates", "loop/rows", "loop/learner",
                                  "rollout/batcher"])  # fmt: skip
def test_tppo_refs_own_rooms_would_be_caught_in_scale(room):
    assert signs(ast.parse((ROOT / "tppo_ref" / f"{room}.py").read_text()))


@pytest.mark.parametrize("source", ["x = tensor.detach().full_tensor()", "total += local.abs().sum()", "parallel.sum([1.0])",
                                    "SlotSchedule(slots=1, window=2, max_response_tokens=3)", "trainer.step()"])  # fmt: skip
def test_what_scale_is_there_for_is_no_sign(source):
    assert signs(ast.parse(source)) == []


# ------------------------------------------------------------------------------------------------------------ imports


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[p.name for p in SOURCES])
def test_scale_does_not_import_sim_tests_or_benchmarks(path):
    tops = {name.lstrip(".").partition(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert not tops & {"sim", "tests", "benchmarks", "notebooks"}


@pytest.mark.parametrize(
    "source",
    [
        "import sim",
        "from sim.clock.plan import plan",
        "import importlib\nimportlib.import_module('sim.clock.plan')",
        "__import__('sim')",
    ],
)
def test_the_checker_of_imports_sees_each_form(source):
    assert any(name.partition(".")[0] == "sim" for name in imports(ast.parse(source)))


@pytest.mark.parametrize("path", SOURCES, ids=[p.name for p in SOURCES])
def test_scale_names_its_own_modules_in_full(path):
    """launch.py takes its own folder off the path: `import config` would not find it, or find another."""
    own = {p.stem for p in SOURCES}
    assert not {name for name in imports(ast.parse(path.read_text())) if name in own or name.startswith(".")}


def test_launch_takes_its_own_folder_off_the_path_before_it_imports_anything_of_ours():
    body = ast.parse((ROOT / "scale" / "launch.py").read_text()).body
    place = next(i for i, node in enumerate(body) if isinstance(node, ast.Assign) and "sys.path" in ast.unparse(node.targets[0]))
    for node in body[:place]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not any(name.partition(".")[0] in ("scale", "tppo_ref", "torch", "vllm") for name in imports(node))


@pytest.mark.parametrize("path", SOURCES, ids=[p.name for p in SOURCES])
def test_no_pickle_shell_or_eval(path):
    tree = ast.parse(path.read_text())
    assert not imports(tree) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load")
            assert not any(k.arg in ("shell", "trust_remote_code", "allow_pickle") and isinstance(k.value, ast.Constant) and k.value.value is True
                           for k in node.keywords)  # fmt: skip
