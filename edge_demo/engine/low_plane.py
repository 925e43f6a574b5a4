"""Adds the low plane of a table in two planes to the logits of candidates.

The candidates graph multiplies the hidden state by the high plane of the head's table, and returns
the most likely tokens. This module reads the low plane only for these tokens, from the weights
file. If it were mapped, a few hundred tokens of text would make all of it resident: see
`edge_demo.bundle.embedding`. The same tokens are often proposed again, so rows are cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.manifest import EmbeddingSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.errors import BundleError

KEPT_BYTES = 6 << 20  # of rows; of Gemma 3 270M some 8,700
_FEWEST = 1024  # minimum number of cached rows, which is more than the number of candidates


class LowPlane:
    """The low plane of an embedding table that is the head, too.

    Args:
        path: of the weights file.
        spec: of the table, which has two planes.
        soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` in the end; `None` for none.

    Raises:
        BundleError: the file cannot be opened.
    """

    def __init__(self, path: Path, spec: EmbeddingSpec, soft_cap: float | None) -> None:
        self._table = EmbeddingTable(path, spec)
        self._cap = None if soft_cap is None else np.float32(soft_cap)
        self._rows = spec.rows
        self._shape = spec.blocks, spec.block_size
        width = spec.blocks * spec.block_size
        count = _num_kept(spec)
        self._places = np.full(spec.rows, -1, np.int32)  # index of a row in the cache
        self._numbers = np.empty((count, width), np.int8)
        self._scales = np.empty((count, spec.blocks), np.float32)
        self._used = 0
        self._gathered = np.empty((0, width), np.int8)  # room for the rows of one call
        self._floats = np.empty((0, width), np.float32)

    @classmethod
    def of(cls, bundle: Bundle) -> LowPlane | None:
        """Returns the low plane of a bundle whose candidates graph needs it from the device, else
        `None`."""
        if not bundle.low_plane_apart:
            return None
        return cls(bundle.path / bundle.weights, bundle.embedding, bundle.final_soft_cap)

    def logits(self, ids: np.ndarray, high: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """The logits of candidates.

        Args:
            ids: int64 `(k,)`, at most 1,024.
            high: float32 `(k,)`, the products with the high plane.
            hidden: float32 `(width,)`, the state that is multiplied.

        Returns:
            float32 `(k,)`.

        Raises:
            BundleError: an id is outside the vocabulary, or as `EmbeddingTable.rows`.
            EdgeError: the file cannot be read.
        """
        if not 0 <= ids.min() <= ids.max() < self._rows:
            raise BundleError(
                "the candidates graph returned token ids outside the vocabulary; export the "
                "bundle again"
            )
        places = self._places[ids]
        if places.min() < 0:
            self._keep(ids[places < 0].tolist(), len(ids))
            places = self._places[ids]
            if places.min() < 0:  # the cache was cleared to make room
                self._keep(ids[places < 0].tolist(), len(ids))
                places = self._places[ids]
        blocks = np.zeros(self._shape, np.float32)
        blocks.reshape(-1)[: len(hidden)] = hidden
        numbers = self._rows_at(places).reshape(-1, *self._shape)
        sums = np.einsum("kbi,bi->kb", numbers, blocks)
        found = high + np.einsum("kb,kb->k", sums, self._scales[places])
        return found if self._cap is None else np.tanh(found / self._cap) * self._cap

    def _rows_at(self, places: np.ndarray) -> np.ndarray:
        """Kept rows, float32 `(k, width)`, until the next call."""
        if len(places) != len(self._gathered):  # each call has as many as there are candidates
            shape = len(places), self._numbers.shape[1]
            self._gathered, self._floats = np.empty(shape, np.int8), np.empty(shape, np.float32)
        np.take(self._numbers, places, axis=0, out=self._gathered, mode="clip")
        self._floats[...] = self._gathered
        return self._floats

    def _keep(self, ids: Sequence[int], wanted: int) -> None:
        """Read rows and cache them; clear the cache if it is full."""
        if self._used + len(ids) > len(self._numbers):
            self._places.fill(-1)
            self._used = 0
            if len(ids) < wanted:
                return
        numbers, scales = self._table.low_plane(ids)
        end = self._used + len(ids)
        self._numbers[self._used : end], self._scales[self._used : end] = numbers, scales
        self._places[ids] = np.arange(self._used, end)
        self._used = end


def memory_needed(spec: EmbeddingSpec, num_candidates: int) -> int:
    """Returns the bytes that a `LowPlane` of a table needs for calls with that many candidates."""
    kept = _num_kept(spec) * (spec.blocks * (spec.block_size + 4))
    return 4 * spec.rows + kept + num_candidates * 5 * spec.blocks * spec.block_size


def _num_kept(spec: EmbeddingSpec) -> int:
    return min(spec.rows, max(_FEWEST, KEPT_BYTES // (spec.blocks * (spec.block_size + 4))))
