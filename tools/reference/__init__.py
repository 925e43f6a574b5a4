"""The pages of `docs/reference/` that are made from the code: `python -m tools.reference`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reference"
COMMAND = "python -m tools.reference"
HEADER = f"<!-- Made by `{COMMAND}`. Do not edit. -->\n<!-- fmt: off -->\n\n"
