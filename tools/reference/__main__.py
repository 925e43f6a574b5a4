"""Write the generated pages of `docs/reference/`: `python -m tools.reference`."""

from __future__ import annotations

from tools.reference import FOLDER, commands, python_api, slow_tests

PAGES = {
    "commands.md": commands.page,
    "python-api.md": python_api.page,
    "tests.md": slow_tests.page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
        print(f"wrote {FOLDER / name}")
