"""A LoRA in memory: two low-rank matrices beside each of some matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """LoRA of one matrix before it has values: its rank, and alpha; the scale is alpha / rank."""

    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """LoRA of one matrix.

    Attributes:
        a: float32 `(in, rank)`.
        b: float32 `(rank, out)`.
        alpha: what is divided by the rank for the scale.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def shape(self) -> Shape:
        return Shape(self.a.shape[1], self.alpha)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA in memory.

    Attributes:
        pairs: the canonical name of a matrix to its LoRA.
        dropout: the share of its inputs that training leaves out.
        rslora: whether its scale was given as alpha / sqrt(rank). In a `Pair` it always is
            alpha / rank.
    """

    pairs: Mapping[str, Pair]
    dropout: float = 0.0
    rslora: bool = False
