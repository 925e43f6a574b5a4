"""Rows where several processes train one model, with JAX: each brings its part of every batch.

All processes are given the same rows and cut the same batches of them. What a process brings is
what its devices hold: JAX makes the whole batch of the parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras.train.batches import RowBatches


def are_several() -> bool:
    """Whether there are several, and the distribution in use is over devices of all or some."""
    made = keras.distribution.distribution()
    return made is not None and made.num_processes > 1


def of_the_first(number: int | None) -> int | None:
    """The number that the first process of the mesh has called this with; `None` is all's."""
    if number is None or not are_several():
        return number
    return int(_of_all([number])[0, 0])


def leave_printing_to_the_first(options: dict[str, Any]) -> None:
    """Set `verbose` of the other processes to 0, unless the user has said what it is."""
    if options.get("verbose", "auto") == "auto" and are_several():
        import jax

        if jax.process_index() != _mesh().devices.flat[0].process_index:
            options["verbose"] = 0


def refuse_if_several(name: str) -> None:
    """Raise `ValueError` of an option that one process alone can have."""
    if are_several():
        raise ValueError(f"{name} is for one process, but several train this model; leave it out")


def fed(batches: Any) -> Any:
    """What Keras is to be given instead of batches: this process's part of each.

    Batches that are no `RowBatches` are returned as they are, and so are all in one process. What a
    batch lacks to be split evenly is added: rows that do not count.

    Raises:
        ValueError: the processes were given different rows or sizes of batches, a loss that may
            count what is added does not get even batches, or the mesh cannot be fed.
    """
    if not isinstance(batches, RowBatches) or not are_several():
        return batches
    parts, own = _parts()
    _refuse_uneven(batches, parts)
    digests = _of_all([_digest(batches)])
    if (digests != digests[0]).any():
        raise ValueError(
            "the processes were given different rows, or different options; give each process all "
            "rows, in the same order, and the batch size of all processes together"
        )
    # Keras divides no PyDataset among processes, and refuses one that is not divided; an adapter it
    # takes as it is.
    from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

    return PyDatasetAdapter(_OfProcess(batches, parts, own))


def part_of(process: int, holders: np.ndarray) -> tuple[int, list[int]]:
    """Into how many parts a batch is split, and which of them the devices of a process hold.

    Args:
        process: its number.
        holders: the process of each device of a mesh, whose first axis is that of batches.

    Raises:
        ValueError: the process holds none, or two processes hold different parts of which one is
            the same.
    """
    held: dict[int, list[int]] = {}
    for part, processes in enumerate(holders.reshape(len(holders), -1)):
        for one in sorted(set(processes.tolist())):
            held.setdefault(one, []).append(part)
    if process not in held:
        raise ValueError(
            f"the mesh has devices of the processes {', '.join(map(str, held))}, but none of "
            f"process {process}; call fit and evaluate on those alone, or use all devices"
        )
    different = {tuple(parts) for parts in held.values()}
    if sum(map(len, different)) > len(holders) or len({len(parts) for parts in different}) > 1:
        raise ValueError(
            f"the {len(holders)} parts of a batch cannot be divided among the {len(held)} "
            "processes; choose a mesh whose processes hold as many parts each, and different "
            "parts or the same"
        )
    return len(holders), held[process]


class _OfProcess(keras.utils.PyDataset):
    """The rows of each batch that are in some of its parts."""

    def __init__(self, batches: RowBatches, parts: int, own: Sequence[int]) -> None:
        super().__init__()
        self._batches, self._parts, self._own = batches, parts, list(own)

    @property
    def num_batches(self) -> int | None:
        return self._batches.num_batches

    def __getitem__(self, index: int):
        return keras.tree.map_structure(self._part, self._batches[index])

    def _part(self, array: np.ndarray) -> np.ndarray:
        more = (0, -len(array) % self._parts)
        array = np.pad(array, (more, *[(0, 0)] * (array.ndim - 1)))
        parts = array.reshape(self._parts, -1, *array.shape[1:])
        return parts[self._own].reshape(-1, *array.shape[1:])


def _refuse_uneven(batches: RowBatches, parts: int) -> None:
    """Raise `ValueError` if rows would be added that the loss may count."""
    if batches.filled:
        return
    first = len(batches[0][1])
    for size in (first, batches.rows - first * (batches.of_a_pass - 1)):
        if size % parts:
            raise ValueError(
                f"a batch of {size} rows does not divide by the {parts} parts of the mesh, and a "
                "loss of your own may count padding; choose another batch_size or number of rows, "
                "or compile with the default loss"
            )


def _digest(batches: RowBatches) -> int:
    """What tells these batches from others."""
    first = batches[0]
    found = zlib.crc32(repr((batches.rows, batches.of_a_pass, first[1].shape)).encode())
    for example in batches.examples:
        found = zlib.crc32(example.ids.tobytes() + example.counts.tobytes(), found)
    return found >> 1  # as JAX has int32


def _parts() -> tuple[int, list[int]]:
    """`part_of` this process."""
    import jax

    made = keras.distribution.distribution()
    holders = np.vectorize(lambda device: device.process_index)(_mesh().devices)
    axis = made.device_mesh.axis_names.index(made.batch_dim_name)
    return part_of(jax.process_index(), np.moveaxis(holders, axis, 0))


def _mesh() -> Any:
    """JAX's mesh of the distribution in use."""
    return keras.distribution.distribution().device_mesh.backend_mesh


def _of_all(numbers: Sequence[int]) -> np.ndarray:
    """What the processes call this with, a row for each device of the mesh; the same on all."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    _parts()  # this process has to be one of them
    devices = Mesh(_mesh().devices.ravel(), ("device",))
    row = np.array([numbers], np.int32)
    split, whole = (NamedSharding(devices, PartitionSpec(*axes)) for axes in (("device",), ()))
    array = jax.make_array_from_callback((devices.size, len(numbers)), split, lambda _: row)
    return np.asarray(jax.jit(lambda a: a, out_shardings=whole)(array))
