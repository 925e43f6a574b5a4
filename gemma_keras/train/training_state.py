"""The state of a training as a file: what is trained, the optimizer, seeds, the place in the data.

A folder holds the last two files, such as `step-00000120.npz`. They are numpy's arrays, without
pickle, with a checksum each. A file gets its name when it is complete. The folder has an empty
file too, which a training keeps locked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from edge_demo.durable import alone
from gemma_keras.checkpoints.unfinished import check_space, unfinished
from gemma_keras.errors import CheckpointError
from gemma_keras.train.arrays import DAMAGED, opened_arrays

_NAME = re.compile(r"step-(\d{8,12})\.npz")
_KEPT = 2
_LOCK = ".lock"
_PLACE = "place"  # the array that holds JSON
_SHOWN = "metric."  # what is shown of an epoch; it changes no weight


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a training is.

    Attributes:
        step: batches that it has learnt from.
        steps_per_epoch: batches of an epoch.
        seed: of the order of rows; `None` keeps the order.
        first: number of the first batch, of those whose gradients are added up.
        of: digests of the rows, the options and the weights that stay as they are, by name.
    """

    step: int
    steps_per_epoch: int
    seed: int | None
    first: int
    of: Mapping[str, str]


def variables_of(model: keras.Model) -> dict[str, Any]:
    """The variables that a step changes, named by kind and number."""
    optimizer: Any = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    seeds = {
        id(generator): generator.state
        for layer in model._flatten_layers()
        for generator in getattr(layer, "_seed_generators", ())
    }
    groups = {
        "weight.": model.trainable_variables,
        "optimizer.": optimizer.variables,
        "seed.": seeds.values(),
        _SHOWN: [v for metric in getattr(model, "_token_metrics", ()) for v in metric.variables],
    }
    return {f"{kind}{i}": one for kind, group in groups.items() for i, one in enumerate(group)}


@contextlib.contextmanager
def only_training_in(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other trainings out of it during the block.

    Raises:
        CheckpointError: it cannot be made or written, or another training has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be read and written; change its permissions")
    lock = folder / _LOCK
    with contextlib.ExitStack() as until_the_end:
        try:
            is_alone = until_the_end.enter_context(alone(lock))
        except OSError as error:
            raise CheckpointError(f"cannot write {lock}: {error.strerror or error}") from error
        if not is_alone:
            raise CheckpointError(
                f"another training is writing to {folder}; wait until it ends, stop it, or give "
                "another folder"
            )
        yield


def check_room(folder: Path, model: keras.Model) -> None:
    """Say at once if there is no space for the files.

    Raises:
        CheckpointError: there is too little.
    """
    size = sum(_num_bytes(variable) for variable in variables_of(model).values())
    more = _KEPT + 1 - len(files_of(folder))  # one is written before the oldest is removed
    check_space(folder / "step", size * max(more, 1))


def _num_bytes(variable: Any) -> int:
    kind = "float32" if variable.dtype == "bfloat16" else variable.dtype
    return int(np.prod(variable.shape)) * np.dtype(kind).itemsize


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, the least step first."""
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def write(folder: Path, model: keras.Model, place: Place) -> Path:
    """Write the state of a model; of older files the last stays.

    Raises:
        CheckpointError: it cannot be written; those before are whole.
    """
    path = folder / f"step-{place.step:08}.npz"
    text = json.dumps(dataclasses.asdict(place)).encode()
    arrays = {_PLACE: np.frombuffer(text, np.uint8)}
    for name, variable in variables_of(model).items():
        value = variable.value
        if variable.dtype == "bfloat16":  # numpy has none
            value = ops.cast(value, "float32")
        arrays[name] = ops.convert_to_numpy(value)
    size = sum(array.nbytes for array in arrays.values())
    written = unfinished(path, "file", size, overwrite=True, is_replaceable=Path.is_file)
    with written as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    for old in files_of(folder)[:-_KEPT]:
        old.unlink(missing_ok=True)
    return path


def read_place(path: Path) -> Place:
    """Where the training was.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with _opened(path) as arrays:
        return Place(**json.loads(arrays[_PLACE].tobytes()))


def restore(path: Path, model: keras.Model) -> dict[str, np.ndarray]:
    """Give a model the state of a file.

    Returns:
        What its metrics had added up, by the name of the variable; an epoch begins without.

    Raises:
        CheckpointError: the file cannot be read, or is of another model; then nothing is changed.
    """
    variables = variables_of(model)
    with _opened(path) as arrays:
        found = {name: arrays[name] for name in arrays.files if name != _PLACE}
    for name in found.keys() | variables.keys():
        here = tuple(variables[name].shape) if name in variables else None
        there = found[name].shape if name in found else None
        if here != there and not name.startswith(_SHOWN):
            raise CheckpointError(
                f"{path} is of another model or optimizer: {name} has the shape {there} there, and "
                f"{here} here"
            )
    for name, array in found.items():
        if not name.startswith(_SHOWN):
            variables[name].assign(array)
    return {name: array for name, array in found.items() if name.startswith(_SHOWN)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with opened_arrays(path) as arrays:
            yield arrays
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} is damaged, and training cannot go on from it; remove it to go on from the "
            f"one before ({error})"
        ) from error
