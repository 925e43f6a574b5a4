"""Recognizes a file by its first bytes: a GGUF file or a Git LFS pointer."""

from __future__ import annotations

from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/spec/"


def begins_as_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's magic bytes."""
    return _first_bytes(path, 4) == b"GGUF"


def explain_pointer(path: Path) -> str | None:
    """Returns the message for a Git LFS pointer; `None` for any other file."""
    if _first_bytes(path, len(_POINTER)) != _POINTER:
        return None
    return f"{path} is a Git LFS pointer, not the file itself; fetch the file with: git lfs pull"


def _first_bytes(path: Path, count: int) -> bytes:
    if not path.is_file():  # a named pipe would never answer
        return b""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""
