"""Files that stand for other files: what Git leaves in place of a large one."""

from __future__ import annotations

from pathlib import Path

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def explained(path: Path) -> str | None:
    """What to say of a Git LFS pointer; `None` for any other file."""
    try:
        with path.open("rb") as file:
            if file.read(len(_BEGINNING)) != _BEGINNING:
                return None
    except OSError:
        return None
    return (
        f"{path} is a Git LFS pointer, a few lines in place of the file; fetch the file itself "
        "with: git lfs pull"
    )
