"""Files that are whole or not there, whatever kills the process that writes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

_UNFINISHED = ".unfinished"


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file that only its owner may read, and give it its name when it is on the disk.

    What a writer that was killed has left beside it is removed. Two writers at once do not harm
    each other: the last one's file stays.

    Args:
        path: of the file; one that is there is replaced, a link's target if it is a link.
        pieces: of its content.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    path = Path(os.path.realpath(path))
    prefix = f".{path.name}."
    _remove_left_over(path.parent, prefix)
    handle, unfinished = tempfile.mkstemp(_UNFINISHED, prefix, path.parent)  # mode 0600
    try:
        with open(handle, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # so that no other writer takes it for left over
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_left_over(folder: Path, prefix: str) -> None:
    for name in os.listdir(folder):
        if name.startswith(prefix) and name.endswith(_UNFINISHED):
            with contextlib.suppress(OSError), open(folder / name, "rb") as file:
                # whoever writes it holds the lock; the kernel takes it from who was killed
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(folder / name)
