"""Takes the pictures of the server's page in `docs/images`, with a real answer in it:

python -m tools.page_pictures build/sample-chat-int8
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

_OUT = Path(__file__).parents[1] / "docs" / "images"
_QUESTIONS = ("What is the capital of France?", "Give me three names for a small boat.")
_VIEWS = {
    "page-desktop": {"viewport": {"width": 1100, "height": 700}, "color_scheme": "light"},
    "page-phone": {"viewport": {"width": 390, "height": 760}, "color_scheme": "dark"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "edge_demo", "serve", str(arguments.bundle)]
    server = subprocess.Popen(
        [*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        url = json.loads(server.stdout.readline())["url"]
        with sync_playwright() as started:
            browser = started.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            for name, view in _VIEWS.items():
                page = browser.new_context(**view).new_page()
                page.goto(f"{url}/")
                talk(page)
                page.screenshot(path=_OUT / f"{name}.png")
                print(_OUT / f"{name}.png")
    finally:
        server.terminate()
        server.wait()


def talk(page: Page) -> None:
    """Ask the questions, greedily."""
    page.get_by_role("button", name="Settings").click()
    page.locator("#temperature").fill("0")
    page.get_by_role("button", name="Done").click()
    for number, question in enumerate(_QUESTIONS, start=1):
        page.get_by_label("Message", exact=True).fill(question)
        page.get_by_role("button", name="Send").click()
        page.locator("article.assistant").nth(number - 1).get_by_text("tokens/s").wait_for()


if __name__ == "__main__":
    main()
