"""Watching what flows into each matrix, one decoder block in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from keras import ops

from export.reference import load_block, run_block
from gemma_keras.config import GemmaConfig
from gemma_keras.layers import GemmaDecoderBlock

TEXT = Path(__file__).with_name("calibration.txt")
# Matrices that see the same inputs, by the first of them, which is the one that is watched.
OBSERVED = {
    "attention.query": ("attention.query", "attention.key", "attention.value"),
    "attention.output": ("attention.output",),
    "mlp.gate": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.down",),
}
_MOST_INPUTS = 4096  # of whose second moments all pairs are kept; beyond it, squares of that size


@dataclasses.dataclass
class Moments:
    """The mean of the outer products of a matrix's inputs, `[in, in]`, as squares on its diagonal.

    Attributes:
        squares: float32, each of at most 4,096 inputs, one after the other.
    """

    squares: list[np.ndarray]

    @property
    def rms(self) -> np.ndarray:
        """Root mean square of each input: float32 `[in]`."""
        return np.sqrt(np.concatenate([np.diag(s) for s in self.squares]))

    def divided_by(self, factors: np.ndarray) -> Moments:
        """Those of the same inputs when input j is divided by `factors[j]`."""
        squares, first = [], 0
        for square in self.squares:
            part = factors[first : first + len(square)]
            squares.append(square / np.outer(part, part))
            first += len(square)
        return Moments(squares)


def observe(
    config: GemmaConfig, weights: Mapping[str, np.ndarray], x: np.ndarray, first_block: int = 0
) -> Iterator[dict[str, Moments]]:
    """Watch the inputs of each block's matrices, on one text.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        x: what block `first_block` sees, float32 `(batch, length, hidden_dim)`; replaced in place
            by what it returns, block after block.
        first_block: the block to begin with.

    Yields:
        For each block: name within the block, of `OBSERVED`, to the moments.
    """
    for i in range(first_block, len(config.layers)):
        block = load_block(config, weights, i)
        with _watch(block) as sums:
            run_block(block, x)
        yield {name: total.mean() for name, total in sums.items()}


class _Sum:
    def __init__(self) -> None:
        self._squares: list[np.ndarray] = []
        self._count = 0

    def add(self, inputs: np.ndarray) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        parts = [
            flat[:, first : first + _MOST_INPUTS] for first in range(0, flat.shape[1], _MOST_INPUTS)
        ]
        if not self._squares:
            self._squares = [np.zeros((p.shape[1], p.shape[1]), np.float32) for p in parts]
        for total, part in zip(self._squares, parts, strict=True):
            total += part.T @ part
        self._count += len(flat)

    def mean(self) -> Moments:
        for total in self._squares:
            total /= np.float32(self._count)
        return Moments(self._squares)


@contextlib.contextmanager
def _watch(block: GemmaDecoderBlock) -> Iterator[dict[str, _Sum]]:
    sums = {name: _Sum() for name in OBSERVED}

    def watch(name: str) -> None:
        dense = block.sublayer(name)
        call = dense.call

        def observed(inputs, *args, **kwargs):
            sums[name].add(np.asarray(ops.convert_to_numpy(inputs), np.float32))
            return call(inputs, *args, **kwargs)

        dense.call = observed

    for name in OBSERVED:
        watch(name)
    yield sums
