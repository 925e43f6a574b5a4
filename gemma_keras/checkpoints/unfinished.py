"""Writing a checkpoint so that it has its final name only when everything in it is right."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from gemma_keras.checkpoints.names import FileFormat, WeightSpec
from gemma_keras.checkpoints.source import Checkpoint, row_pieces, table_pieces
from gemma_keras.errors import CheckpointError

_SLACK = 16 << 20  # headers, small files, what a file system takes for itself
_PARTIAL, _REPLACED = ".partial", ".old.partial"


@contextlib.contextmanager
def unfinished(
    target: Path,
    kind: Literal["file", "folder"],
    num_bytes: int,
    *,
    overwrite: bool,
    is_replaceable: Callable[[Path], bool],
) -> Iterator[Path]:
    """A path beside `target` to write to, which becomes `target` when the block ends well.

    Whatever else ends it removes what was written; what a killed process left is removed by the
    next one that writes the same target.

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
    with _told_in_a_sentence(target):
        _check_target(target, overwrite=overwrite, is_replaceable=is_replaceable)
        _check_space(target, num_bytes + _SLACK)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial = _beside(target, _PARTIAL)
        try:
            if kind == "folder":
                partial.mkdir()
            yield partial
            for path in partial.iterdir() if kind == "folder" else (partial,):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            _check_target(target, overwrite=overwrite, is_replaceable=is_replaceable)
            _put_in_place(partial, target)
        finally:
            _remove(partial)


def write_json_and_notices(
    folder: Path, texts: Mapping[str, str], notices: Mapping[str, bytes]
) -> None:
    """Write the small files of a checkpoint; a notice must not take the name of another file."""
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, content in notices.items():
        path = folder / name
        if Path(name).name != name or path.exists():
            raise CheckpointError(f"the notice {name!r} must have a plain name of its own")
        path.write_bytes(content)


def file_pieces(
    checkpoint: Checkpoint, spec: WeightSpec, file_format: FileFormat
) -> Iterator[np.ndarray]:
    """A weight as a file holds it, float32 from row to row; of a table a piece is in memory.

    Raises:
        CheckpointError: the weight is missing or of another shape.
    """
    if spec.name not in checkpoint.weights:
        raise CheckpointError(f"the weights lack {spec.name}")
    if spec.kind == "table":
        pieces = (rows for _, rows in table_pieces(checkpoint.weights, spec.name))
    else:
        array = spec.to_file(checkpoint.weights[spec.name], file_format)
        pieces = iter([array]) if array.ndim == 1 else (rows for _, rows in row_pieces(array))
    wrong = CheckpointError(f"{spec.name} is not of the shape {list(spec.shape)}")
    num_rows = 0
    for piece in pieces:
        num_rows += len(piece)
        if piece.shape[1:] != spec.file_shape[1:] or num_rows > spec.file_shape[0]:
            raise wrong
        yield np.ascontiguousarray(piece, np.float32)
    if num_rows != spec.file_shape[0]:
        raise wrong


def check_range(array: np.ndarray, largest: float, name: str, stored_as: str) -> None:
    """Refuse numbers that become infinite in another type, and those that are not finite.

    Args:
        array: float32.
        largest: the greatest magnitude that `stored_as` holds.
        name: of the weight.
        stored_as: the type, for people.
    """
    found = np.abs(array).max()
    if not found <= largest:
        raise CheckpointError(
            f"{name} holds {found:g}, {stored_as} ends at {largest:g}; write another type"
        )


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
