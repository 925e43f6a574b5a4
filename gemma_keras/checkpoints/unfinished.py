"""Writing a checkpoint that gets its name only when it is complete, with a sentence for whatever
the disk says."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from edge_demo.durable import Kept, whole_or_nothing
from gemma_keras.errors import CheckpointError

_SLACK = 16 << 20  # headers, small files, what a file system takes for itself


@contextlib.contextmanager
def unfinished(
    target: Path,
    kind: Literal["file", "folder"],
    num_bytes: int,
    *,
    overwrite: bool,
    is_replaceable: Callable[[Path], bool],
    kept: Kept = lambda folder: (),
) -> Iterator[Path]:
    """As `whole_or_nothing`, for a checkpoint.

    Args:
        target: the final path; folders above it are made.
        kind: a folder is made, a file is left to the caller.
        num_bytes: about what will be written.
        overwrite: whether an existing target may be replaced.
        is_replaceable: whether an existing target is of the kind that this writer writes.
        kept: as for `whole_or_nothing`.

    Raises:
        CheckpointError: the target is taken, there is too little space, or the disk cannot be
            written or is full.
    """

    def check() -> None:
        _check_target(target, overwrite=overwrite, is_replaceable=is_replaceable)

    with _disk_errors_as_sentences(target):
        check()
        check_space(target, num_bytes + _SLACK)
        with whole_or_nothing(target, kind, check, kept) as partial:
            yield partial


def _check_target(target: Path, *, overwrite: bool, is_replaceable: Callable[[Path], bool]) -> None:
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} already exists; choose another path, or set overwrite=True"
        )
    if not is_replaceable(target):
        raise CheckpointError(
            f"{target} is not a checkpoint of this format, so it will not be overwritten; "
            "move it away or choose another path"
        )


def check_space(target: Path, needed: int) -> None:
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is not a folder, so {target} cannot be made in it")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{target} needs about {needed / 1e6:,.0f} MB; {parent} has {free / 1e6:,.0f} MB free"
        )


@contextlib.contextmanager
def _disk_errors_as_sentences(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space was left while writing {target}; nothing was kept there"
            ) from error
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
