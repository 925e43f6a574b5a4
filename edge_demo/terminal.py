"""Showing a model's words on a terminal without letting them steer it."""

from __future__ import annotations

import sys
from typing import TextIO

# Escape sequences in generated text could move the cursor or set the title: control characters
# other than newline and tab are shown as their pictures (U+2400 block) instead.
_VISIBLE = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def show(text: str) -> None:
    """Write generated text to stdout at once; as it is unless stdout is a terminal."""
    sys.stdout.write(_visible(text, sys.stdout))
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line about the run to stderr, dimmed on a terminal."""
    text = _visible(text, sys.stderr)
    if sys.stderr.isatty():
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)


def complain(error: object) -> None:
    """Write why a command ends to stderr, on one line."""
    print(f"edge-demo: {_visible(str(error), sys.stderr)}", file=sys.stderr, flush=True)


def _visible(text: str, stream: TextIO) -> str:
    return text.translate(_VISIBLE) if stream.isatty() else text


def megabytes(num_bytes: int) -> str:
    """A size for people, in decimal units."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
