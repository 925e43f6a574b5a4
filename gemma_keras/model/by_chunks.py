"""Sums over tokens, with what a token needs much memory for made of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops


def summed(
    function: Callable[..., Sequence[Any]], arrays: Sequence[Any], tokens: int
) -> tuple[Any, ...]:
    """Sums what a function makes of chunks; for gradients each chunk is computed again.

    Rows stay together, and on their devices.

    Args:
        function: makes tensors of `(batch, chunk, ...)` tensors. Their shapes do not depend on the
            chunk. Of padding, which is zeros, it makes zeros.
        arrays: `(batch, length, ...)` each, of a known length.
        tokens: of a chunk, in all rows together, but at least one of each row.
    """
    batch, length = arrays[0].shape[:2]
    step = max(1, tokens // (batch or 1))
    chunk = keras.remat(function)
    if keras.config.backend() == "jax" and length > step:
        return _scanned(chunk, arrays, step)
    parts = [slice(first, first + step) for first in range(0, length, step)]
    made = [chunk(*(array[:, part] for array in arrays)) for part in parts]
    return tuple(sum(column[1:], column[0]) for column in zip(*made, strict=True))


def _scanned(chunk, arrays, step: int) -> tuple[Any, ...]:
    """One chunk after another; what a compiler sees side by side it may compute side by side."""
    batch, length = arrays[0].shape[:2]
    count = -(-length // step)

    def chunks(array):
        rest = [(0, 0)] * (len(array.shape) - 2)
        array = ops.pad(array, [(0, 0), (0, count * step - length), *rest])
        array = ops.reshape(array, (batch, count, step, *array.shape[2:]))
        return ops.swapaxes(array, 0, 1)  # (count, batch, step, ...)

    def add(sums, one):
        return tuple(a + b for a, b in zip(sums, chunk(*one), strict=True)), None

    arrays = tuple(map(chunks, arrays))
    first = tuple(chunk(*(array[0] for array in arrays)))
    sums, _ = ops.scan(add, first, tuple(array[1:] for array in arrays))
    return sums
