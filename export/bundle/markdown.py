"""Markdown of model cards."""

from __future__ import annotations

from typing import Any


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: Any) -> str:
    """Formats untrusted text from a checkpoint on one line and without markup."""
    kept = "".join(c if c.isprintable() else " " for c in str(text))
    return "".join("\\" + c if c in "\\`*_[]<>|#!" else c for c in kept)
