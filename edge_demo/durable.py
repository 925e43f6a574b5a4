"""Writes a file or folder that gets its final name only when it is complete.

An unfinished target is in the same folder under a random name, and is locked while its writer
lives. (Process ids mean nothing between containers that share a volume.) If it is not locked, its
writer was killed.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

_PARTIAL, _REPLACED = ".partial", ".old.partial"
_TOKEN = re.compile(r"[0-9a-f]{12}|\d+")  # a process id in earlier versions

Kept = Callable[[Path], Iterable[str]]


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that only its owner may read; it gets its name when it is on the disk.

    Two writers at once do not harm each other: the last one's file stays.

    Args:
        path: of the file; one that is there is replaced, a link's target if it is a link.
        chunks: of its content.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    path = Path(os.path.realpath(path))
    os.stat(path.parent)  # folders above it are not made
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with (
        whole_or_nothing(path, "file", check=lambda: None, mode=0o600) as partial,
        partial.open("wb") as file,
    ):
        for chunk in chunks:
            file.write(chunk)
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_or_nothing(
    target: Path,
    kind: Literal["file", "folder"],
    check: Callable[[], None],
    kept: Kept = lambda folder: (),
    mode: int = 0o666,
) -> Iterator[Path]:
    """A path beside `target` to write to, which becomes `target` when the block ends well.

    Whatever else ends it removes what was written; what a killed process left is removed by the
    next one that writes the same target.

    Args:
        target: the final path; folders above it are made.
        kind: a folder is made, a file is left to the caller.
        check: raises if the target is taken; called before the block and after it.
        kept: of a folder that is replaced, the names of what goes along into the new one.
        mode: of a file, before the process's mask.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target, kept)
    check()
    with _made(target, kind, mode) as partial:
        yield partial
        for path in partial.rglob("*") if kind == "folder" else (partial,):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        check()
        _put_in_place(partial, target, kept)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(6)}{suffix}"


@contextlib.contextmanager
def _made(target: Path, kind: Literal["file", "folder"], mode: int) -> Iterator[Path]:
    """A fresh folder, or empty file, that is locked until the block ends, and then removed if it is
    still there."""
    while True:
        partial = _beside(target, _PARTIAL)
        partial.mkdir() if kind == "folder" else partial.touch(mode, exist_ok=False)
        with _locked(partial) as lock:
            if lock is _Lock.LOST:  # another writer took it for left over, before it was locked
                continue
            try:
                yield partial
            finally:
                _remove(partial)
            return


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether nobody else has this file locked; then it is locked during the block.

    It is made if there is none, and stays. The kernel unlocks what a process that was killed had
    locked. Where a system or a file system has no locks, nobody has it locked.

    Raises:
        OSError: it cannot be made or written.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield fcntl is None or _try_lock(handle, path) is not _Lock.LOST
    finally:
        os.close(handle)


class _Lock(enum.Enum):
    """What came of locking a path."""

    HELD = enum.auto()
    LOST = enum.auto()  # another process has it, or it is gone
    UNKNOWN = enum.auto()  # this file system has no locks


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[_Lock]:
    """Lock a file or folder during the block, unless another process has it; the kernel unlocks
    what a process that was killed had locked."""
    if fcntl is None:
        yield _Lock.UNKNOWN
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield _Lock.LOST
        return
    try:
        yield _try_lock(handle, path)
    finally:
        os.close(handle)


def _try_lock(handle: int, path: Path) -> _Lock:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.LOST
    except OSError:
        return _Lock.UNKNOWN
    try:
        there = os.stat(path)
    except OSError:
        return _Lock.LOST
    return _Lock.HELD if os.path.samestat(there, os.fstat(handle)) else _Lock.LOST


def _put_in_place(partial: Path, target: Path, kept: Kept) -> None:
    if not target.is_dir():
        partial.replace(target)
        return
    old = _beside(target, _REPLACED)
    with _locked(target):  # and under its new name, so that no other writer takes it for left over
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
        _carry_over(old, target, kept)
        _remove(old)


def _carry_over(old: Path, target: Path, kept: Kept) -> None:
    """Move what is to be kept of a replaced folder into the new one, under a name that is free."""
    for name in kept(old):
        free, number = name, 0
        while (target / free).exists() or (target / free).is_symlink():
            number += 1
            free = f"{name}.kept{number}"
        (old / name).rename(target / free)


def _remove_abandoned(target: Path, kept: Kept) -> None:
    """Clear away what a writer that was killed has left beside the target."""
    prefix = f".{target.name}."
    for path in target.parent.iterdir():
        token = path.name.removeprefix(prefix).split(".")[0]
        ours = path.name in (f"{prefix}{token}{_PARTIAL}", f"{prefix}{token}{_REPLACED}")
        if not ours or not _TOKEN.fullmatch(token):
            continue
        with _locked(path) as lock:
            if lock is _Lock.HELD:
                _clear(path, target, kept)


def _clear(path: Path, target: Path, kept: Kept) -> None:
    if path.name.endswith(_REPLACED):
        if not target.exists():
            path.rename(target)  # it was killed between taking the old away and its own turn
            return
        if path.is_dir() and target.is_dir():
            _carry_over(path, target, kept)  # and here before all of it was moved
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
