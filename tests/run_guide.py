"""Run what guides say, as it is written, in one process, so that Keras starts once:

    python -m tests.run_guide RESULTS.json GUIDE.md FOLDER [GUIDE.md FOLDER …]

A fenced block is run if the line before it is `<!-- run -->`. Python blocks of a guide share their
names. Lines of `export-onnx` and `edge-demo` run in this process; a block with pipes, redirections
or here-documents runs in bash. The folder of a guide holds the files that it names, and becomes the
current one. RESULTS.json gets for each guide's path the error that ended it, or an empty text.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(
    r"(?P<run><!-- run -->\n)?^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.M | re.S
)
_FOR_BASH = re.compile(r"[|<>;&]")
_FUNCTIONS = (
    'export-onnx() { "$PYTHON" -m export "$@"; }; edge-demo() { "$PYTHON" -m edge_demo "$@"; }\n'
)


class Block(NamedTuple):
    """A fenced block of a document: its language, its text, and whether it is marked to be run."""

    language: str
    code: str
    run: bool


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks, in order."""
    return [Block(m["language"], m["code"], bool(m["run"])) for m in _FENCE.finditer(markdown)]


def command_lines(code: str) -> list[str]:
    """The commands of a shell block; a backslash at the end of a line joins the next."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(block: Block, names: dict) -> None:
    """Run a block; raises whatever it raises, or `SystemExit` for a command that fails."""
    print(f"--- {block.language}\n{block.code}---", flush=True)
    if block.language == "python":
        exec(compile(block.code, "<guide>", "exec"), names)
    elif _FOR_BASH.search(re.sub(r'"[^"]*"', "", block.code)):
        script = f"set -euo pipefail\n{_FUNCTIONS}{block.code}"
        subprocess.run(
            ["bash", "-c", script], check=True, env=os.environ | {"PYTHON": sys.executable}
        )
    else:
        for line in command_lines(block.code):
            _run_command(shlex.split(line))


def _run_command(words: list[str]) -> None:
    from edge_demo.cli.main import main as edge_demo
    from export.cli import main as export_onnx

    status = {"edge-demo": edge_demo, "export-onnx": export_onnx}[words[0]](words[1:])
    if status:
        sys.exit(f"{shlex.join(words)} ended with status {status}")


def run_guide(guide: Path, folder: Path) -> str:
    """Run a guide in a folder: the error that ended it, or an empty text."""
    print(f"=== {guide.name}", flush=True)
    os.chdir(folder)
    names: dict = {"__name__": "__guide__"}
    try:
        for block in blocks(guide.read_text()):
            if block.run:
                run(block, names)
    except BaseException:  # a command that exits too
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    results, *pairs = (Path(argument).resolve() for argument in sys.argv[1:])
    errors = {str(g): run_guide(g, f) for g, f in zip(pairs[::2], pairs[1::2], strict=True)}
    results.write_text(json.dumps(errors))
