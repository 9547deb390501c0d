"""Every notebook runs whole in a fresh kernel, prints what is stored, and its exercises have solutions that work.

One test per notebook starts a kernel; the others read the stored file. A stored text that differs from a fresh run's fails:
`python notebooks/refresh.py` stores it anew, after a look at why it changed.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import socket
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from notebooks import refresh

ROOT = Path(__file__).resolve().parents[1]
PATHS = refresh.notebooks()
README = (refresh.HERE / "README.md").read_text()
each_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def solutions(path: Path) -> dict[str, str]:
    """{"1": python source, ...} from the page beside the notebook: the block under `## Exercise 1`."""
    page = path.parent / "solutions" / f"{path.stem}.md"
    parts = re.split(r"^## Exercise (\d+)", page.read_text(), flags=re.MULTILINE)[1:] if page.exists() else []
    blocks = {number: re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
              for number, text in zip(parts[::2], parts[1::2], strict=True)}  # fmt: skip
    assert all(len(block) == 1 for block in blocks.values()), f"{page.name}: expected one python block per exercise"
    return {number: block for number, (block,) in blocks.items()}


def with_solutions(notebook: Any, solved: dict[str, str]) -> Any:
    """The notebook, then in the same kernel each solution in the place of its exercise, and its check."""
    longer = nbformat.from_dict(notebook)
    for number, cells in refresh.exercises(notebook).items():
        for source in (solved[number], notebook.cells[cells["check"]].source):
            longer.cells.append(nbformat.v4.new_code_cell(source))
    return longer


def differences(stored: Any, fresh: Any) -> list[str]:
    """Lines that differ between the texts of two runs of the same cells, with the cell's number."""
    before, after = refresh.texts(stored), refresh.texts(fresh)
    return [
        f"cell {number}: {line}"
        for number in before
        for line in difflib.unified_diff(
            before[number].splitlines(), after[number].splitlines(), "stored", "fresh", lineterm="", n=0
        )
    ]


# ------------------------------------------------------------------------------------------------------------ with a kernel


@each_notebook
def test_runs_whole_prints_what_is_stored_and_its_solutions_work(path):
    stored = refresh.read(path)
    fresh = refresh.run(with_solutions(stored, solutions(path)))
    assert not differences(stored, fresh), "\n".join([*differences(stored, fresh), f"run: python notebooks/refresh.py {path.name}"])
    assert all(pictures(a) == pictures(b) for a, b in zip(code_cells(stored), code_cells(fresh), strict=False))
    checks = [cell for cell in fresh.cells[len(stored.cells) :]][1::2]
    assert len(checks) == len(refresh.exercises(stored))
    for cell in checks:
        assert printed(cell).strip().endswith("all right"), printed(cell)
        assert "still wrong" not in printed(cell)


def cells(*sources: str) -> Any:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


WARN = """
import warnings

def stops(module):
    try:
        warnings.warn_explicit("stale", UserWarning, "file.py", 1, module=module)
    except UserWarning:
        return True
    return False

assert [stops(m) for m in ("tppo_ref.loop.rows", "tppo_ref", "sim.lab.bias", "sim", "__main__")] == [True] * 5
assert [stops(m) for m in ("numpy.linalg", "tppo_reference", "simpy.sim")] == [False] * 3
"""


def test_a_warning_of_ours_stops_a_notebook_and_one_of_others_does_not():
    refresh.run(cells(WARN))
    with pytest.raises(CellExecutionError, match="stale"):
        refresh.run(cells("import warnings; warnings.warn('stale')"))


def test_a_notebook_that_takes_too_long_is_stopped_and_says_by_how_much(monkeypatch):
    """By the CPU seconds of its kernel, which starting alone takes some of: other processes of a busy machine make none of them."""
    monkeypatch.setattr(refresh, "NOTEBOOK_CPU_S", 0)
    with pytest.raises(TimeoutError, match=r"^the notebook took \d+\.\d s of CPU.*; expected at most 0$"):
        refresh.run(cells("pass"))
    monkeypatch.setattr(refresh, "CELL_S", 1)
    with pytest.raises(CellTimeoutError, match="while True: pass"):
        refresh.run(cells("while True: pass"))


def test_the_sliders_redraw_and_without_ipywidgets_the_static_picture_stays():
    notebook = refresh.read(refresh.HERE / "01_from_ppo_to_tppo.ipynb")
    last = next(n for n, cell in enumerate(notebook.cells) if "with_sliders(draw_cut" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    move = """
from ipywidgets import interactive
from ipywidgets.widgets.widget import _instances

panel = next(w for w in _instances.values() if isinstance(w, interactive))
panel.children[0].value, panel.children[1].value = 0.5, 18
print(panel.kwargs, [kind for output in panel.out.outputs for kind in output.get("data", {})])
"""
    notebook.cells += cells(move, "import sys; sys.modules['ipywidgets'] = None", notebook.cells[last].source).cells
    moved, _, without = refresh.run(notebook).cells[-3:]
    assert printed(moved) == "{'lam': 0.5, 'window': 18} ['text/plain', 'image/png']\n"
    assert pictures(without) == 1


# ----------------------------------------------------------------------------------------------------------- stored files


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@each_notebook
def test_every_cell_was_run_in_order_without_error_or_stderr(path):
    notebook = refresh.read(path)
    run = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    for cell in run:
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        shows = re.search(r"^\s*(print|plt\.show|display)\(", cell.source, flags=re.MULTILINE)
        defines = all(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom) for node in ast.parse(cell.source).body
        )
        assert cell.outputs or not shows or defines, cell.source
        assert not {"raises-exception", "skip-execution"} & set(cell.metadata.get("tags", []))


@each_notebook
def test_nothing_of_a_machine_is_in_the_file(path):
    notebook = refresh.read(path)
    text = path.read_text()
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(?:work|root|home|tmp|Users)/|[A-Z]:\\\\|\bat 0x[0-9a-f]{6,}", without_pictures)
    written = "\n".join(str(output) for cell in code_cells(notebook) for output in cell.outputs)
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", re.sub(r"'image/png': '[^']*'", "", written))
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.language_info) == {"name"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells), "run: python notebooks/refresh.py"
    assert text == nbformat.writes(refresh.clean(notebook)) + "\n", "run: python notebooks/refresh.py"


@each_notebook
def test_the_first_code_cell_prints_versions_and_seed_and_the_last_asserts(path):
    first, *_, last = code_cells(refresh.read(path))
    assert "volatile" in first.metadata.tags
    assert re.search(r"\d+\.\d+", printed(first))
    assert re.search(r"\bseeds? ?[:=]?\s*\d+", printed(first))
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(last.source))) >= 3


@each_notebook
def test_the_picture_comes_within_the_first_three_cells(path):
    assert any(cell.cell_type == "code" and pictures(cell) for cell in refresh.read(path).cells[:3])


@each_notebook
def test_code_cells_are_short_and_draw_nothing_by_themselves(path):
    """Machinery is imported: what a cell computes fits on a screen, and its figures are made in a module beside the notebook."""
    first, *cells, last = code_cells(refresh.read(path))
    for cell in cells:
        if not cell.metadata.get("tags") or cell.metadata.tags == ["volatile"]:
            assert len(cell.source.splitlines()) <= 24, cell.source
        assert "plt.subplots" not in cell.source
    assert len(first.source.splitlines()) <= 32
    assert len(last.source.splitlines()) <= 46


@each_notebook
def test_a_figure_takes_a_methods_colour_from_its_name_and_not_from_its_place(path):
    """`look("tppo")`, never `COLOURS[i]` in a loop over rules, arms or methods."""
    for cell in code_cells(refresh.read(path)):
        loops = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.For)]
        named = [loop for loop in loops if re.search(r"\b(RULES|SHOWN|CUTS|by_rule|METHODS)\b", ast.unparse(loop.iter))]
        assert not any(re.search(r"\bCOLOURS\[", ast.unparse(loop)) for loop in named), cell.source


@each_notebook
def test_every_figure_is_described_in_words_below_it(path):
    notebook = refresh.read(path)
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type == "code" and pictures(cell):
            assert below is not None
            assert below.cell_type == "markdown"
            assert below.source.startswith("*In words:*"), cell.source
            assert len(below.source.split("\n\n")[0].split()) >= 20


AXES = re.compile(r"\b[a-z]\w*_[A-Z]{1,3}\b")  # values_BT, policy_NA


@each_notebook
def test_a_reader_is_told_what_capitals_at_a_names_end_mean_before_the_first_such_name_in_code(path):
    notebook = refresh.read(path)
    first = next((n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code" and AXES.search(cell.source)), None)
    told = [n for n, cell in enumerate(notebook.cells) if cell.cell_type == "markdown" and re.search(r"\baxes\b", cell.source)]
    assert first is None or min(told, default=first) < first, notebook.cells[first].source


@each_notebook
def test_every_exercise_runs_as_shipped_says_what_is_wrong_and_has_a_solution(path):
    notebook = refresh.read(path)
    found = refresh.exercises(notebook)
    assert 2 <= len(found) <= 4
    assert set(found) == set(solutions(path))
    for places in found.values():
        assert places["check"] == places["exercise"] + 1
        assert "still wrong" in printed(notebook.cells[places["check"]])


@each_notebook
def test_notebooks_import_and_do_not_redefine(path):
    """The subject itself, advantages, masks and losses, exists once."""
    files = [ROOT / "tppo_ref" / "method" / f"{room}.py" for room in ("advantages", "masks", "losses")]
    subject = {node.name for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    source = "\n".join(cell.source for cell in code_cells(refresh.read(path)))
    defined = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert {"egae", "policy_token_mask", "policy_loss"} <= subject
    assert not defined & subject


def test_the_table_names_every_notebook_and_every_link_is_there():
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    assert {path.name for path in PATHS} <= set(linked)
    assert all((refresh.HERE / link).exists() for link in linked)
    assert len(re.findall(r"^\| .*\b0[1-6]_\w+", README, flags=re.MULTILINE)) == 6


@each_notebook
def test_links_between_pages_lead_somewhere(path):
    for cell in refresh.read(path).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)#:]+)\)", cell.source):
                assert (path.parent / link).exists(), link


# ------------------------------------------------------------------------------------------------- the checks themselves


def outputs(*texts: str, tags: tuple[str, ...] = ()) -> Any:
    """A notebook whose cells have printed `texts`."""
    notebook = cells(*["print()"] * len(texts))
    for cell, text in zip(notebook.cells, texts, strict=True):
        cell.outputs, cell.metadata["tags"] = [nbformat.v4.new_output("stream", name="stdout", text=text)], list(tags)
    return notebook


def test_a_stored_number_that_a_fresh_run_does_not_print_is_noticed():
    assert not differences(outputs("error 0.021\n", "b"), outputs("error 0.021\n", "b"))
    assert "cell 0: -error 0.021" in differences(outputs("error 0.021\n", "b"), outputs("error 0.022\n", "b"))
    assert not differences(outputs("took 3 s", tags=("volatile",)), outputs("took 4 s", tags=("volatile",)))


def test_texts_hold_prints_results_and_tables_and_no_pictures():
    notebook = outputs("printed\n")
    data = [{"text/plain": "result"}, {"text/html": "<b>table</b>"}, {"image/png": "aGk=", "text/plain": "<Figure size 8x4>"}]
    notebook.cells[0].outputs += [nbformat.v4.new_output("display_data", d) for d in data]
    text = refresh.texts(notebook)[0]
    assert all(part in text for part in ("printed", "result", "<b>table</b>", "<Figure size 8x4>"))
    assert "aGk=" not in text


def test_cleaning_leaves_the_static_picture_of_a_slider_and_no_trace_of_a_run():
    notebook = outputs("x")
    data = {"image/png": "aGk=", "text/plain": "picture", refresh.WIDGET: {"model_id": "f00d"}}
    notebook.cells[0].outputs.append(nbformat.v4.new_output("display_data", data))
    notebook.cells[0].metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    notebook.metadata["widgets"] = {"state": {}}
    cleaned = json.dumps(refresh.clean(notebook))
    assert "aGk=" in cleaned
    assert not any(trace in cleaned for trace in ("f00d", "2026", "widgets"))
