"""Writing a file or folder that has its final name only when everything in it is right."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from gemma_keras.errors import CheckpointError

_SLACK = 16 << 20  # headers, small files, what a file system takes for itself
_PARTIAL, _REPLACED = ".partial", ".old.partial"


@contextlib.contextmanager
def whole_or_nothing(
    target: Path, kind: Literal["file", "folder"], check: Callable[[], None]
) -> Iterator[Path]:
    """A path beside `target` to write to, which becomes `target` when the block ends well.

    Whatever else ends it removes what was written; what a killed process left is removed by the
    next one that writes the same target.

    Args:
        target: the final path; folders above it are made.
        kind: a folder is made, a file is left to the caller.
        check: raises if the target is taken; called before the block and after it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    check()
    partial = _beside(target, _PARTIAL)
    try:
        if kind == "folder":
            partial.mkdir()
        yield partial
        for path in partial.iterdir() if kind == "folder" else (partial,):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        check()
        _put_in_place(partial, target)
    finally:
        _remove(partial)


@contextlib.contextmanager
def unfinished(
    target: Path,
    kind: Literal["file", "folder"],
    num_bytes: int,
    *,
    overwrite: bool,
    is_replaceable: Callable[[Path], bool],
) -> Iterator[Path]:
    """As `whole_or_nothing`, for a checkpoint.

    Args:
        target: the final path; folders above it are made.
        kind: a folder is made, a file is left to the caller.
        num_bytes: about what will be written.
        overwrite: whether an existing target may be replaced.
        is_replaceable: whether an existing target is of the kind that this writer writes.

    Raises:
        CheckpointError: the target is taken, there is too little space, or the disk cannot be
            written or is full.
    """

    def check() -> None:
        _check_target(target, overwrite=overwrite, is_replaceable=is_replaceable)

    with _told_in_a_sentence(target):
        check()
        _check_space(target, num_bytes + _SLACK)
        with whole_or_nothing(target, kind, check) as partial:
            yield partial


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}{suffix}"


def _check_target(target: Path, *, overwrite: bool, is_replaceable: Callable[[Path], bool]) -> None:
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists already; choose another, or overwrite=True")
    if not is_replaceable(target):
        raise CheckpointError(
            f"{target} is not a checkpoint of this format, so it will not be overwritten; move it"
        )


def _check_space(target: Path, needed: int) -> None:
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is not a folder, so {target} cannot be made in it")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs about {needed / 1e6:,.0f} MB; {parent} has {free / 1e6:,.0f} MB free"
        )


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.is_dir():
        partial.replace(target)
        return
    old = _beside(target, _REPLACED)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _remove(old)


def _remove_abandoned(target: Path) -> None:
    """Clear away what a writer that was killed has left beside the target."""
    prefix = f".{target.name}."
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(prefix).split(".")[0]
        ours = path.name in (f"{prefix}{pid}{_PARTIAL}", f"{prefix}{pid}{_REPLACED}")
        if not ours or not pid.isdigit() or _is_running(int(pid)):
            continue
        if path.name.endswith(_REPLACED) and not target.exists():
            path.rename(target)  # it was killed between taking the old away and its own turn
        else:
            _remove(path)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _told_in_a_sentence(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space was left while writing {target}; nothing was kept there"
            ) from error
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
