"""What the pages say, held against the code and against the committed measurements."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import fair_headline, fair_told
from benchmarks.headline import sentence
from tppo_ref.runs import docs_pages as tables
from tppo_ref.runs.build import make_task
from tppo_ref.runs.config import METHODS, Config
from tppo_ref.runs.parsing import get_field, parse, replace_fields
from tppo_ref.runs.plans import plan_of
from tppo_ref.runs.warmstart import tiny_policy_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_docs_config_is_the_dataclasses() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == tables.config_markdown(), "run: python -m tppo_ref.runs.docs_pages"


@pytest.mark.parametrize("task", ["chain", "fork"])
def test_the_readme_says_what_the_benchmark_printed(task: str) -> None:
    flowing = " ".join(README.replace("\n> ", "\n").split())
    assert sentence(RESULTS / f"headline-{task}" / "summary.csv") in flowing


def test_a_sentence_changes_with_its_summary(tmp_path: Path) -> None:
    text = (RESULTS / "headline-chain" / "summary.csv").read_text()
    row = next(line for line in text.splitlines() if line.startswith("tppo,speed-up,x,geometric mean"))
    *before, value, low, high, reached = row.split(",")
    changed = ",".join([*before, str(float(value) + 1), low, high, reached])
    (tmp_path / "summary.csv").write_text(text.replace(row, changed))
    assert sentence(tmp_path / "summary.csv") != sentence(RESULTS / "headline-chain" / "summary.csv")


def test_the_runs_of_the_demo_that_the_readme_names_are_those_that_it_makes() -> None:
    demo = parse(Config, ["--config", str(ROOT / "tppo_ref" / "configs" / "demo.yaml")], prog="demo")
    named = re.findall(r"runs/demo/runs/([\w-]+)-seed(\d+)", (ROOT / "README.md").read_text())
    assert named
    assert all(method in demo.compare.methods and int(seed) < demo.compare.seeds for method, seed in named)


@pytest.mark.parametrize("name", ["demo", "demo-quick"])
def test_the_demo_runs_with_the_cells_that_the_fair_headline_chose(name: str) -> None:
    demo = parse(Config, ["--config", str(ROOT / "tppo_ref" / "configs" / f"{name}.yaml")], prog="demo")
    with (RESULTS / "fair-headline-chain.csv").open(newline="") as file:
        chosen = {row["arm"]: json.loads(row["cell"]) for row in csv.DictReader(file)}
    assert demo.compare.methods == list(chosen)
    for method, cell in chosen.items():
        plan = plan_of(demo, method)
        assert {path: get_field(plan, path) for path in cell if path != "model.value"} == {
            path: value for path, value in cell.items() if path != "model.value"
        }


def test_the_readme_says_what_the_fair_headline_found() -> None:
    """Its table is benchmarks.front_page's; here the words around it."""
    row = {task: fair_told.found(task, "area") for task in fair_headline.TASKS}
    verdicts = {task: found["verdict"] for task, found in row.items()}
    assert verdicts == dict.fromkeys(("chain", "fork", "length"), "better") | dict.fromkeys(("maze", "brackets"), "undecided")
    assert (
        "was chosen on the first three tasks. It is ahead on `chain` and `length`, on `fork` only before any correction"
        in " ".join(README.split())
    )
    assert "made to test the cut, no gain is shown" in README
    assert all(fair_told.found(task, "seconds")["low"] < 2 for task in fair_headline.TASKS), "2x is shown on none"
    assert README.index("## Is it faster?") < README.index("PPO reaches it"), "what came out against PPO at its best comes first"


@pytest.mark.parametrize("task", fair_headline.TASKS)
def test_the_readme_says_how_small_the_models_are(task: str) -> None:
    shape = tiny_policy_config(make_task(replace_fields(Config(), {"task.name": task})))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    (said,) = re.findall(r"The models have about ([\d,]+) parameters", README)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(int(said.replace(",", "")), rel=0.01)


def test_both_methods_were_swept_over_the_same_cells_and_seeds() -> None:
    with (RESULTS / "sweep-chain.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = {m: sorted((r["lr"], r["mini_batch_tokens"], r["seed"]) for r in rows if r["method"] == m) for m in ("ppo", "tppo")}
    assert cells["ppo"] == cells["tppo"]
    assert len(cells["ppo"]) == len(set(cells["ppo"])) >= 12


def test_every_page_that_the_readme_links_is_there_and_every_method_is_named() -> None:
    for name in re.findall(r"\]\(((?:docs|benchmarks)/[^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    assert set(re.findall(r"`([a-z-]+)`", README.partition("Method names:")[2].partition("##")[0])) == set(METHODS)


def test_every_page_has_its_place_in_the_site() -> None:
    nav = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert nav == pages | notebooks | {"notebooks/README.md"}
    listed = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert listed >= pages, "docs/README.md lists the pages"


NAMED_FILE = re.compile(r"(?<![\w./{<-])((?:[\w.-]+/)*\w+\.(?:py|yaml|ipynb))\b(?!\()")


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
                                  *sorted(p for w in ("tppo_ref", "sim", "scale", "benchmarks") for p in (ROOT / w).rglob("*.py"))],
                         ids=lambda page: str(page.relative_to(ROOT)))  # fmt: skip
def test_every_file_that_a_text_names_is_there(page: Path) -> None:
    """By its path from the checkout, from its wing or from where the text stands; a bare name may stand anywhere."""
    tops = ("tppo_ref", "sim", "scale", "notebooks", "benchmarks", "tests", "examples", "docs", ".ci")
    there = {str(path.relative_to(ROOT)) for top in tops for path in (ROOT / top).rglob("*") if path.is_file()}
    others = ("my_task.py", "mine.yaml", "configuration.py", "arg_utils.py")  # a user's, transformers', vLLM's
    for name in (found.removeprefix("../") for found in NAMED_FILE.findall(page.read_text())):
        assert name in others or any(path == name or path.endswith(f"/{name}") for path in there), name


def test_no_machine_path_and_no_registry_host_is_in_a_page() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RESULTS.rglob("*.md"), *RESULTS.rglob("*.json")]:
        text = page.read_text()
        assert not re.search(r"/(?:work|root|home|tmp)/", text), page


def test_the_theory_page_names_tests_that_exist_and_every_law_and_refutation():
    page = (ROOT / "docs" / "theory.md").read_text()
    laws = (ROOT / "tests" / "test_bias_laws.py").read_text()
    proofs, _, conservation = page.partition("## Conservation")
    there = set(re.findall(r"^def (test_\w+)", laws, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", proofs))
    assert named - there == set(), "named on the page, and no test"
    assert {f"p{i}" for i in range(1, 8)} <= {name.split("_")[1].rstrip("s") for name in named}
    for fraction in ("175/164096", "1043/164096", "25/492288", "29849/492288"):
        assert fraction in page
        numerator, denominator = fraction.split("/")
        assert re.search(rf"{numerator}\D+{denominator}", laws), f"{fraction} is in no test"
    everywhere = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").glob("*.py")), re.MULTILINE))
    for law in re.split(r"^(?=\*\*F\d)", conservation, flags=re.MULTILINE)[1:]:
        named = set(re.findall(r"`(test_\w+)`", law))
        assert named, law
        assert named <= everywhere, law


def test_every_law_that_a_text_takes_from_the_theory_page_is_there():
    stated = set(re.findall(r"^(?:## |\*\*)([PF]\d)\b", (ROOT / "docs" / "theory.md").read_text(), re.MULTILINE))
    texts = [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb"),
             *(path for wing in ("tppo_ref", "sim", "scale", "benchmarks", "tests") for path in (ROOT / wing).rglob("*.py"))]  # fmt: skip
    named = {law for path in texts for law in re.findall(r"theory\.md[^\n]{0,20}?\b([PF]\d)\b", path.read_text())}
    assert {"P4", "F1", "F6"} <= named
    assert named <= stated
