"""Reads Linux's files about the system and this process."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """Returns a file's text; empty if it is missing or not readable."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def read_sizes(text: str) -> dict[str, int]:
    """The fields of `/proc/meminfo` or `/proc/self/status` that are sizes, in bytes."""
    sizes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            sizes[name] = int(words[0]) * 1024
    return sizes
