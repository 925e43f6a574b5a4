"""Execute notebooks in a temporary copy of their folder, one after another, and write them with
their outputs.

Usage: python -m tools.notebooks FOLDER [NOTEBOOK …]

FOLDER gets the executed notebooks: `notebooks` itself, or another folder that is there. Without
names, all are executed. What the error stream gets is left out.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
_SECONDS_A_CELL = 900
# Set by the tests, or by who runs this; a notebook chooses for itself.
_LEFT_OUT = ("KERAS_BACKEND", "JAX_DISABLE_MOST_OPTIMIZATIONS", "MPLBACKEND")


def execute(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook beside a copy of its data; errors as nbclient raises them."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        for data in path.parent.iterdir():
            if data.suffix in (".jsonl", ".txt"):
                shutil.copy(data, folder)
        client = NotebookClient(
            notebook,
            timeout=_SECONDS_A_CELL,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        environment = {k: v for k, v in os.environ.items() if k not in _LEFT_OUT}
        environment["PYTHONPATH"] = str(ROOT)
        environment["IPYTHONDIR"] = str(Path(folder, ".ipython"))
        client.execute(env=environment)
    return _tidied(notebook)


def _tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without the error stream, and without what differs from one machine to the next."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def main(folder: str, *names: str) -> None:
    for path in [NOTEBOOKS / n for n in names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        start = time.monotonic()
        notebook = execute(path)
        nbformat.write(notebook, Path(folder, path.name))
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
