"""Runs notebooks in a fresh kernel and stores them with what they printed and drew, and with nothing of this machine.

    python notebooks/refresh.py [01_from_ppo_to_tppo.ipynb ...]        default: every notebook of this folder

Run it after each edit: tests/test_notebooks.py runs every notebook again and compares the texts with the stored ones.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
CELL_S = 90  # of the wall clock: a cell that hangs is stopped
NOTEBOOK_CPU_S = 90  # of its kernel, one thread: a whole notebook, in the seconds that it takes where nothing else runs
WIDGET = "application/vnd.jupyter.widget-view+json"
# Warnings that our packages raise, or that a cell itself provokes, stop the notebook; those of other libraries do not.
STRICT = "import warnings; warnings.filterwarnings('error', module=r'(tppo_ref|sim|__main__)(\\.|$)')"


def notebooks() -> list[Path]:
    """All notebooks, solutions not included, in order."""
    return sorted(HERE.glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run(notebook: Any, folder: Path = HERE) -> Any:
    """A copy of `notebook`, executed from top to bottom in a kernel of its own in `folder`, cleaned.

    nbclient.exceptions.CellExecutionError shows the cell that raised; a warning of ours raises too. A notebook that takes too long
    is a TimeoutError.
    """
    executed = nbformat.from_dict(notebook)
    client = NotebookClient(
        executed, timeout=CELL_S, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}}, extra_arguments=[f"--IPKernelApp.exec_lines={STRICT}"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:  # one thread, and no start-up files of the user's
        before_s = cpu_s_of_kernels()
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1", "IPYTHONDIR": scratch})
        taken_s = cpu_s_of_kernels() - before_s
    if taken_s > NOTEBOOK_CPU_S:
        raise TimeoutError(f"the notebook took {taken_s:.1f} s of CPU, kernel included; expected at most {NOTEBOOK_CPU_S}")
    return clean(executed)


def cpu_s_of_kernels() -> float:
    """CPU seconds of this process's children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def clean(notebook: Any) -> Any:
    """`notebook` without timings, random ids and whatever names a machine. Sliders leave their static picture behind."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    })  # fmt: skip
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
            output.get("metadata", {}).pop("needs_background", None)
    return notebook


def texts(notebook: Any) -> dict[int, str]:
    """What each code cell wrote, by cell number, except in cells tagged `volatile`: the same in every run, on every machine.

    Pictures are not compared: their bytes depend on the version of matplotlib. So a number that matters is printed, too.
    """
    found: dict[int, str] = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or "volatile" in cell.metadata.get("tags", []):
            continue
        data = (output.get("data", {}) for output in cell.outputs)
        written = [output.text for output in cell.outputs if output.output_type == "stream"]
        written += [d[kind] for d in data for kind in ("text/plain", "text/markdown", "text/html") if kind in d]
        found[number] = "\n".join(line.rstrip() for line in "\n".join(written).splitlines())
    return found


def exercises(notebook: Any) -> dict[str, dict[str, int]]:
    """{"1": {"exercise": cell number, "check": cell number}, ...} from the tags `exercise-1` and `check-1`."""
    found: dict[str, dict[str, int]] = {}
    for number, cell in enumerate(notebook.cells):
        for tag in cell.metadata.get("tags", []):
            if match := re.fullmatch(r"(exercise|check)-(\d+)", tag):
                found.setdefault(match[2], {})[match[1]] = number
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="files of this folder; none = all")
    for path in parser.parse_args().notebooks or notebooks():
        path = HERE / path.name
        nbformat.write(run(read(path)), path)
        print(f"{path.name}: stored")


if __name__ == "__main__":
    main()
