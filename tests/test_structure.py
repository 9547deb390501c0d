"""The import law and other promises about the source as such, held by reading it (ast) and by importing it apart."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("tppo_ref", "sim", "scale")
OUTSIDE = ("notebooks", "tests", "benchmarks")


def sources(house: str) -> list[Path]:
    return sorted((ROOT / house).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ALL_SOURCES = [path for house in HOUSES for path in sources(house)]
MODULES = [module_of(path) for path in sources("tppo_ref")]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def imported(tree: ast.AST, package: str = "tppo_ref") -> Iterator[str]:
    """Top-level names of everything that a file imports, wherever in the file; relative imports stay in their house."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            yield from (str(a.value).partition(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant))


def called(node: ast.Call) -> str:
    """Dotted name of what a call calls, as written."""
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([*([function.id] if isinstance(function, ast.Name) else []), *reversed(parts)])


# --------------------------------------------------------------------------------------------------------- the import law


def law_breakers(house: str, tree: ast.AST) -> set[str]:
    """Houses that a file of `house` imports and must not."""
    forbidden = {"tppo_ref": {"sim", "scale"}, "sim": {"scale"}, "scale": {"sim"}}[house] | {*OUTSIDE}
    return forbidden & set(imported(tree, house))


@pytest.mark.parametrize("path", ALL_SOURCES, ids=names(ALL_SOURCES))
def test_the_import_law(path):
    house = path.relative_to(ROOT).parts[0]
    assert not law_breakers(house, ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("house", "line", "breaks"),
    [
        ("tppo_ref", "import sim.lab.bias", {"sim"}),
        ("tppo_ref", "def f():\n    from scale.config import ScaleConfig", {"scale"}),
        ("sim", "import numpy, scale as s", {"scale"}),
        ("scale", "import importlib; importlib.import_module('sim.clock.plan')", {"sim"}),
        ("sim", "from tests import helpers", {"tests"}),
        ("scale", "from tppo_ref.loop.trainer import Trainer", set()),
        ("tppo_ref", "from . import types\nimport simplejson", set()),
    ],
)
def test_the_checker_of_the_import_law_sees_every_form(house, line, breaks):
    assert law_breakers(house, ast.parse(line)) == breaks


@pytest.mark.parametrize("house", ["sim", "scale"])
def test_the_other_houses_build_on_tppo_ref(house):
    assert any("tppo_ref" in set(imported(ast.parse(path.read_text()), house)) for path in sources(house))


# -------------------------------------------------------------------------------------------------- importing runs nothing

PROBE = """
import io, json, os, sys, contextlib
import torch
def state():
    import random, warnings, signal
    import numpy as np
    return {
        "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(), "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "precision": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "rng": torch.get_rng_state().sum().item(), "seed": torch.initial_seed(), "cwd": os.getcwd(),
        "environ": sorted(k for k in os.environ if not k.startswith(("KMP_", "TF_", "TORCHINDUCTOR"))),
        "python_rng": hash(random.getstate()), "numpy_rng": int(np.random.get_state()[1].sum()),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
    }
import gymnasium, transformers  # whatever other packages do to the process is theirs
names = json.loads(sys.argv[1])
found = {}
for name in names:
    before, out = state(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        __import__(name)
    after = state()
    found[name] = {"output": out.getvalue(), "changed": [k for k in before if before[k] != after[k]]}
print(json.dumps(found))
"""


def test_importing_any_module_prints_nothing_and_changes_no_global_setting(tmp_path):
    modules = [module_of(path) for path in ALL_SOURCES]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(modules)], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: seen for name, seen in found.items() if seen["output"] or seen["changed"]} == {}
    assert len(found) == len(modules) > 80
    assert list(tmp_path.iterdir()) == [], "importing wrote a file"


def clean_environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


TASK_MODULES = [name for name in MODULES if name.startswith("tppo_ref.tasks")]


@pytest.mark.parametrize("module", TASK_MODULES)
def test_tasks_import_neither_torch_nor_transformers(module):
    """The verifier's processes import them, and must start fast."""
    slow = "{'torch', 'transformers', 'jsonargparse', 'pandas', 'scipy'}"
    code = f"import sys, {module}; print(sorted({slow} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(), timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_core_imports_neither_vllm_nor_ray():
    for path in sources("tppo_ref"):
        assert not {"vllm", "ray", "deepspeed"} & set(imported(ast.parse(path.read_text()))), path


# --------------------------------------------------------------------------------------------------- loading runs no code


def dangers(tree: ast.AST) -> list[str]:
    """Calls that would run code from a file, or a shell."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        keywords = {k.arg: k.value for k in node.keywords}
        is_true = [k for k, v in keywords.items() if isinstance(v, ast.Constant) and v.value is True]
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
            found.append(name)
        if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "np.load", "numpy.load"):
            found.append(name)
        if name == "torch.load" and "weights_only" not in is_true:
            found.append("torch.load without weights_only=True")
        found += [f"{k}=True" for k in ("trust_remote_code", "shell", "allow_pickle") if k in is_true]
    return found


@pytest.mark.parametrize("path", sources("tppo_ref"), ids=names(sources("tppo_ref")))
def test_nothing_loads_code_or_starts_a_shell(path):
    assert dangers(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    ["pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "g(x, trust_remote_code=True)",
     "subprocess.run('ls', shell=True)", "eval('1')", "def f():\n  return pickle.loads(b)"],
)  # fmt: skip
def test_the_checker_of_dangers_sees_each(line):
    assert dangers(ast.parse(line))


def test_the_checker_of_dangers_lets_the_right_form_pass():
    assert dangers(ast.parse("torch.load(f, weights_only=True); g(trust_remote_code=config.trust)")) == []


def test_code_of_a_checkpoint_folder_runs_only_when_asked_for():
    from tppo_ref.runs.config import Config

    assert Config().model.trust_remote_code is False


# ------------------------------------------------------------------------------------------------------- wings and circles

WINGS = ("method", "rollout", "loop", "tasks", "runs")
"""Of tppo_ref, in order: each imports only what stands before it; tasks does not import loop either. Doors and command lines
(`__init__.py`, `__main__.py`) stand above all of them."""

METHOD_IMPORTS = {"torch", "numpy"}
"""What method/ imports beside itself and the standard library."""

MODULES_OF = {house: {module_of(path): ast.parse(path.read_text()) for path in sources(house)} for house in (*HOUSES, "benchmarks")}
GRAPH = {name: tree for trees in MODULES_OF.values() for name, tree in trees.items()}


def imports(module: str, tree: ast.AST, modules: Mapping[str, ast.AST]) -> set[str]:
    """The modules, of those given, that a module imports, wherever in its source: in functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []  # no module here is a package of relative imports
            source = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {name if (name := f"{source}.{alias.name}") in modules else source for alias in node.names}
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            found |= {str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found & set(modules)


def circle(modules: Mapping[str, ast.AST]) -> list[str]:
    """Modules that import each other in a circle, the first one twice; none where there is no circle."""
    graph = {name: imports(name, tree, modules) for name, tree in modules.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def upward(modules: Mapping[str, ast.AST]) -> set[tuple[str, str]]:
    """Imports from a wing into one that does not stand before it."""
    found = set()
    for name, tree in modules.items():
        for other in imports(name, tree, modules):
            one, two = (module.split(".")[1] if module.count(".") > 1 else "" for module in (name, other))
            if one in WINGS and two in WINGS and (WINGS.index(two) > WINGS.index(one) or (one, two) == ("tasks", "loop")):
                found.add((name, other))
    return found


def across(modules: Mapping[str, ast.AST]) -> set[tuple[str, str]]:
    """Imports between sim/lab and sim/clock."""
    found = {(name, other) for name, tree in modules.items() for other in imports(name, tree, modules)}
    return {(one, two) for one, two in found if {one.split(".")[1], two.split(".")[1]} == {"lab", "clock"}}


def private(modules: Mapping[str, ast.AST]) -> set[tuple[str, str]]:
    """Names with a leading underscore that a module takes from another one of ours."""
    return {
        (name, f"{node.module}.{alias.name}")
        for name, tree in modules.items() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__") and (node.module or "").split(".")[0] in (*HOUSES, "benchmarks")
    }  # fmt: skip


def parsed(**modules: str) -> dict[str, ast.AST]:
    return {name.replace("__", "."): ast.parse(source) for name, source in modules.items()}


def test_no_module_imports_itself_by_way_of_others():
    assert circle(GRAPH) == []
    assert len(GRAPH) > 100


def test_each_wing_imports_only_what_stands_before_it():
    assert upward(MODULES_OF["tppo_ref"]) == set()
    folders = {path.parent.name for path in sources("tppo_ref")} - {"tppo_ref"}
    assert folders == set(WINGS), "a folder without a place in the order"


def test_the_laboratory_and_the_clock_do_not_know_each_other():
    assert across(MODULES_OF["sim"]) == set()


def test_nobody_takes_a_private_name_from_another_file():
    assert private(GRAPH) == set()


@pytest.mark.parametrize("path", sources("tppo_ref/method"), ids=names(sources("tppo_ref/method")))
def test_the_method_imports_torch_integers_and_itself(path):
    tree = ast.parse(path.read_text())
    assert set(imported(tree)) - METHOD_IMPORTS - {"tppo_ref"} <= set(sys.stdlib_module_names)
    modules = {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tppo_ref")
    }
    assert all(module.startswith("tppo_ref.method") for module in modules)


def test_the_checkers_of_wings_and_circles_see_what_is_planted():
    assert circle(parsed(a="import b", b="def f():\n    from c import x", c="from a import y"))
    assert circle(parsed(a__x="from a import y", a__y="import a.x as z"))
    assert circle(parsed(a="import importlib\nimportlib.import_module('b')", b="import a"))
    assert circle(parsed(a__x="from . import y", a__y="from .x import f"))
    assert circle(parsed(a="import b, c", b="import c", c="import torch")) == []
    low, high = "from tppo_ref.method.records import End", "def f():\n    from tppo_ref.runs import config"
    planted = parsed(
        tppo_ref__method__records="", tppo_ref__runs__config=low, tppo_ref__loop__trainer=high, tppo_ref__tasks__chain=low
    )
    assert upward(planted) == {("tppo_ref.loop.trainer", "tppo_ref.runs.config")}
    planted = parsed(tppo_ref__loop__rows="", tppo_ref__tasks__chain="import tppo_ref.loop.rows")
    assert upward(planted) == {("tppo_ref.tasks.chain", "tppo_ref.loop.rows")}
    assert across(parsed(sim__lab__a="from sim.clock import b", sim__clock__b="", sim__command="import sim.lab.a")) == {
        ("sim.lab.a", "sim.clock.b")
    }
    assert private(parsed(sim__a="from sim.b import _c, __version__\nfrom torch import _x")) == {("sim.a", "sim.b._c")}


# ---------------------------------------------------------------------------------------------------------- small rooms

MAX_FILE, MAX_FUNCTION, MAX_METHOD = 350, 60, 1000  # lines

LONG_STILL: set[str] = set()
"""Files and functions above these, `path` or `path::name`: whoever shortens one takes it off, and nobody adds one."""


def too_long(path: str, source: str) -> set[str]:
    """The file, and each function in it, that is longer than it may be."""
    found = {path} if len(source.splitlines()) > MAX_FILE else set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION:
            found.add(f"{path}::{node.name}")
    return found


def test_files_and_functions_are_short():
    paths = [path for house in (*HOUSES, "benchmarks", "notebooks") for path in sources(house)]
    found = {long for path in paths for long in too_long(str(path.relative_to(ROOT)), path.read_text())}
    assert found == LONG_STILL


def test_the_method_is_read_in_an_hour():
    assert sum(len(path.read_text().splitlines()) for path in sources("tppo_ref/method")) <= MAX_METHOD


def test_the_checker_of_lengths_counts_lines():
    body = "    x = 1\n"
    assert too_long("a.py", "def f():\n" + 59 * body) == set()
    assert too_long("a.py", "class C:\n    def f(self):\n" + 60 * ("    " + body)) == {"a.py::f"}
    assert too_long("a.py", 350 * "x = 1\n") == set()
    assert too_long("a.py", 351 * "x = 1\n") == {"a.py"}


@pytest.mark.parametrize("path", ALL_SOURCES, ids=names(ALL_SOURCES))
def test_every_file_and_public_class_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file says nothing of itself"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


# ------------------------------------------------------------------------------------------------ the maps show what is there


@pytest.mark.parametrize("house", ["sim", "scale"])
def test_the_map_of_a_house_names_each_of_its_files_and_no_others(house):
    page = (ROOT / "docs" / f"{house}.md").read_text()
    named = set(re.findall(r"\b([a-z_]+\.py)\b", page))
    files = {path.name for path in (ROOT / house).rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert files - named == set(), "files that the page does not name"
    known = files | {path.name for other in HOUSES for path in sources(other)}
    assert named - known == set(), "names of files that are not there"
