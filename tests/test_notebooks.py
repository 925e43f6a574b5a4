"""The notebooks run from beginning to end, and the outputs that are committed are theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import nbformat
import pytest

from tests.test_plain_english import long_sentences
from tools.notebooks import NOTEBOOKS, ROOT

NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
_PATHS = re.compile(r"/(?:home|root|tmp|work|usr|opt|Users|var)/|[A-Z]:\\")


def read(path) -> nbformat.NotebookNode:
    notebook = nbformat.read(str(path), as_version=4)
    nbformat.validate(notebook)
    return notebook


def printed(notebook) -> str:
    """What its cells print."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(out.get("text", "") for cell in cells for out in cell.outputs)


def check_figures(name: str, text: str) -> None:
    """That a notebook shows what it says, on this machine too."""

    def numbers(pattern: str) -> list[float]:
        found = re.search(pattern, text)
        assert found, f"{name} does not print {pattern}"
        return [float(group) for group in found.groups()]

    if name == "first_steps.ipynb":
        (share,) = numbers(r"same top token ([\d.]+)%")
        assert share > 90
    elif name == "lora_on_instructions.ipynb":
        losses = [float(loss) for loss in re.findall(r"val_loss: ([\d.]+)", text)]
        (right,) = numbers(r"(\d+) of 12 are right")
        assert losses[-1] < 0.7 * losses[0] and right >= 3
    elif name == "distil_from_a_bundle.ipynb":
        pattern = r"divergence [\d.]+ \(best ([\d.]+)\), perplexity \d+ \(best (\d+)\)"
        alone = numbers(f"text alone: {pattern}")
        distilled = numbers(f"distilled: {pattern}")
        assert distilled[0] < alone[0] and distilled[1] < alone[1]
    else:
        before, after = numbers(r"held-out margin before (-?[\d.]+), after (-?[\d.]+)")
        assert abs(before) < 0.05 and after > 0.5


def test_there_are_notebooks():
    assert NAMES == [
        "distil_from_a_bundle.ipynb",
        "first_steps.ipynb",
        "lora_on_instructions.ipynb",
        "preferences.ipynb",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_has_its_outputs(name):
    path = NOTEBOOKS / name
    assert path.stat().st_size < 300_000
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert {out.output_type for out in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [out for out in outputs if out.get("name") == "stderr"]
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert pictures and max(map(len, pictures)) < 60_000 * 4 / 3  # base64
    shown = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs]
    found = _PATHS.search("\n".join([*shown, *(cell.source for cell in notebook.cells)]))
    assert not found, f"{name} shows a path of a machine: {found}"
    check_figures(name, printed(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_says_is_short_and_leads_somewhere(name):
    text = "\n\n".join(c.source for c in read(NOTEBOOKS / name).cells if c.cell_type != "code")
    assert not long_sentences(re.sub(r"`[^`]*`", "it", text))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (NOTEBOOKS / target).exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.notebooks", str(tmp_path), name],
        cwd=ROOT,
        env=os.environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,  # beside other parts of the suite; 30 to 120 s alone
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_figures(name, printed(read(tmp_path / name)))
