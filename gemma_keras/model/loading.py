"""Creates Keras variables directly from a checkpoint's weights, chunk by chunk."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras.checkpoints.names import WeightSpec
from gemma_keras.checkpoints.source import TableSource, WeightSource, row_chunks
from gemma_keras.errors import CheckpointError
from gemma_keras.model.chunked import Chunk, made

_CHUNK_BYTES = 16 << 20  # bytes of float32 in a chunk; one or two copies of it are made


def weight_chunks(weights: Mapping[str, np.ndarray], spec: WeightSpec) -> Iterator[Chunk]:
    """Yields a weight as its Keras variable stores it, in chunks; a head is transposed.

    Args:
        weights: canonical name to array; tables, and a file's matrices, are read in chunks.
        spec: of the weight.

    Raises:
        CheckpointError: the weight is missing, has another shape, or is not finite.
    """
    if spec.name not in weights:
        raise CheckpointError(f"the weights lack {spec.name}")
    readable = {"table": TableSource, "matrix": WeightSource}.get(spec.kind)
    if readable is not None and isinstance(weights, readable):
        expected, transposed = spec.file_shape, spec.kind == "matrix" or spec.name == "head"
        rows = weights.table_chunks(spec.name, _CHUNK_BYTES)
    else:
        expected, transposed = spec.shape, spec.name == "head"
        array = weights[spec.name]
        _require_shape(spec, array.shape, expected)
        rows = [(0, array)] if array.ndim == 1 else row_chunks(array, _CHUNK_BYTES)
    end = 0
    for first, array in rows:
        end = first + len(array)
        _require_shape(spec, (max(end, expected[0]), *array.shape[1:]), expected)
        yield Chunk(array.T, 1, first) if transposed else Chunk(array, 0, first)
    _require_shape(spec, (end, *expected[1:]), expected)


def _require_shape(spec: WeightSpec, found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{spec.name} has shape {tuple(found)}, expected {tuple(expected)}")


@dataclasses.dataclass(frozen=True)
class FromWeights:
    """An initializer for `GemmaBackbone` that creates its variables from a checkpoint's weights.

    Args:
        weights: canonical name to array; see `gemma_keras.checkpoints.names`.
    """

    weights: Mapping[str, np.ndarray]


# --- making variables of weights -----------------------------------------------------------------


class _Initializer(keras.initializers.Initializer):
    """Makes the variables of a layer of weights, in the order in which the layer adds them."""

    def __init__(self, weights: Mapping[str, np.ndarray], specs: list[WeightSpec]) -> None:
        self.weights = weights
        self.specs = specs

    def __call__(self, shape, dtype: Any = None):
        spec = self.specs.pop(0)
        return made(tuple(shape), dtype, weight_chunks(self.weights, spec))


@contextlib.contextmanager
def initialized_from(
    weights: Mapping[str, np.ndarray],
    specs: Mapping[str, WeightSpec],
    places: Mapping[str, tuple[keras.layers.Layer, str]],
) -> Iterator[None]:
    """Layers that are built in this context create their variables from weights.

    Args:
        weights: canonical name to array.
        specs: canonical name to `WeightSpec`, for every weight.
        places: canonical name to a layer and its attribute that holds the initializer; where two
            weights have the same place, the layer adds them in this order.

    Raises:
        CheckpointError: a weight is missing, has another shape, is not finite, or no variable was
            made from it.
    """
    initializers: dict[tuple[int, str], _Initializer] = {}
    before = []
    for name, spec in specs.items():
        if name not in weights:
            raise CheckpointError(f"the weights lack {name}")
        layer, attribute = places[name]
        if (id(layer), attribute) not in initializers:
            before.append((layer, attribute, getattr(layer, attribute)))
            made_from = initializers[id(layer), attribute] = _Initializer(weights, [])
            setattr(layer, attribute, made_from)
        initializers[id(layer), attribute].specs.append(spec)
    try:
        yield
    finally:
        for layer, attribute, initializer in before:  # and the weights can be let go
            setattr(layer, attribute, initializer)
    left = [spec.name for made_from in initializers.values() for spec in made_from.specs]
    if left:
        raise CheckpointError(
            f"{left[0]} and {len(left) - 1} more weights have no float variable in this "
            "dtype; load the model in a float dtype, then call quantize"
        )
