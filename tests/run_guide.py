"""Run what a guide says, as it is written, in one process: `python -m tests.run_guide GUIDE.md`.

A fenced block is run if the line before it is `<!-- run -->`. Python blocks share their names. Lines
of `export-onnx` and `edge-demo` run in this process, so that Keras starts once; a block with pipes,
redirections or here-documents runs in bash. The current folder holds the files that guides name.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
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


if __name__ == "__main__":
    names: dict = {"__name__": "__guide__"}
    for block in blocks(Path(sys.argv[1]).read_text()):
        if block.run:
            run(block, names)
