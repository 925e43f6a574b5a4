"""Computes the input statistics of a matrix: second moments of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

_MOST_INPUTS = 4096  # of whose second moments all pairs are kept; beyond it, squares of that size


@dataclasses.dataclass
class InputStatistics:
    """The mean of the outer products of a matrix's inputs, `[in, in]`, as squares on its diagonal.

    Attributes:
        squares: float32, each of at most 4,096 inputs, one after the other.
    """

    squares: list[np.ndarray]

    @property
    def rms(self) -> np.ndarray:
        """Root mean square of each input: float32 `[in]`."""
        return np.sqrt(np.concatenate([np.diag(s) for s in self.squares]))

    def divided_by(self, divisors: np.ndarray | None) -> Iterator[np.ndarray]:
        """The squares of the same inputs when input j is divided by `divisors[j]`, if by anything.

        They are made on demand, because all of them can be a large part of the memory.
        """
        first = 0
        for square in self.squares:
            last = first + len(square)
            if divisors is None:
                yield square
            else:
                yield square / np.outer(divisors[first:last], divisors[first:last])
            first = last


class MomentSum:
    """Adds up the statistics of inputs that come in chunks."""

    def __init__(self) -> None:
        self._squares: list[np.ndarray] = []
        self._count = 0

    def add(self, inputs: np.ndarray) -> None:
        """Take in float32 `(..., in)`."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        parts = [
            flat[:, first : first + _MOST_INPUTS] for first in range(0, flat.shape[1], _MOST_INPUTS)
        ]
        if not self._squares:
            self._squares = [np.zeros((p.shape[1], p.shape[1]), np.float32) for p in parts]
        for total, part in zip(self._squares, parts, strict=True):
            total += part.T @ part
        self._count += len(flat)

    def mean(self) -> InputStatistics:
        """The statistics of all so far; the sum is used up."""
        squares, self._squares = self._squares, []
        for total in squares:
            total /= np.float32(self._count)
        return InputStatistics(squares)
