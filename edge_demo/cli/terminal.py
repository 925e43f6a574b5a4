"""Prints model output safely on a terminal, and shows progress."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import Any, TextIO

from edge_demo.errors import LONGEST_MESSAGE, brief, sentence

# Escape sequences in generated text could move the cursor or set the title: control characters
# other than newline and tab are shown as their pictures (U+2400 block) instead.
_VISIBLE = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def show(text: str) -> None:
    """Write generated text to stdout and flush it; escape control characters only on a terminal."""
    sys.stdout.write(_visible(text, sys.stdout))
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line about the run to stderr, dimmed on a terminal that has it.

    `NO_COLOR` in the environment turns that off (no-color.org).
    """
    text = _visible(text, sys.stderr)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if sys.stderr.isatty() and not plain:
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def complain(error: object) -> None:
    """Write why a command ends to stderr, on one line."""
    text = _visible(brief(sentence(error), LONGEST_MESSAGE), sys.stderr)
    print(f"edge-demo: {text}", file=sys.stderr, flush=True)


def _visible(text: str, stream: TextIO) -> str:
    return text.translate(_VISIBLE) if stream.isatty() else text


def as_json(value: Any) -> str:
    """Returns JSON; infinity and NaN, which JSON lacks, become null."""

    def known(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: known(inner) for key, inner in value.items()}
        return [known(inner) for inner in value] if isinstance(value, list | tuple) else value

    return json.dumps(known(value), allow_nan=False)


class Progress:
    """Shows the progress of a long run on stderr, with an estimate of the remaining time.

    On a terminal it updates one line; otherwise it prints a new line from time to time.

    Args:
        what: name of one step.
        every_s: seconds between two lines of a log.
        vanishes: whether the line is removed from a terminal at the end.
    """

    def __init__(self, what: str, every_s: float = 30.0, vanishes: bool = False) -> None:
        self._what = what
        self._every_s = every_s
        self._vanishes = vanishes
        self._start = self._shown = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Step number `done` of `total` is done."""
        now = time.perf_counter()
        line = f"{self._what} {done:,} of {total:,}"
        if done < total:
            line += f", {_duration((now - self._start) / done * (total - done))} left"
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            if self._vanishes and done == total:
                line = end = ""
            print(f"\r{line}\x1b[K", end=end, file=sys.stderr, flush=True)
        elif now - self._shown >= self._every_s:
            print(line, file=sys.stderr, flush=True)
            self._shown = now


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
