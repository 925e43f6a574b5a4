"""Reads single rows of the embedding table from the weights file when they are needed.

The table is not memory-mapped, unlike in onnxruntime. With a map, a kernel with large pages in its
page cache would map a large page for each row that is read. Soon the whole table would count as
resident memory.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_demo.bundle.manifest import EmbeddingSpec
from edge_demo.errors import BundleError, EdgeError, RequestError

_LOW_PLANE_STEPS = np.float32(16)  # of the low plane in one of the high


class EmbeddingTable:
    """An embedding table in an open weights file.

    Args:
        path: of the weights file.
        spec: place and format of the table in it.

    Raises:
        BundleError: the file cannot be opened.
    """

    def __init__(self, path: Path, spec: EmbeddingSpec) -> None:
        self._path = path
        self._spec = spec
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):  # no read-ahead: rows are read at random
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._places = {
            name: (spec.parts[name].offset, np.dtype(dtype), row_bytes)
            for name, (dtype, row_bytes) in spec.layout.items()
        }
        self._scale = np.float32(spec.scale)
        if spec.by_rows:
            self._columns = self._read("columns", [0])[0]
        elif spec.block_size:
            bits = spec.bits // spec.planes
            self._levels_of_byte = _levels_of_byte(bits)
            self._middle = np.float32(1 << bits - 1)

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self._spec.width

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Returns embeddings as the graphs take them, bit-identical to those of `model.onnx`.

        Args:
            ids: of the tokens, at least one, in any order.

        Returns:
            float32 `(len(ids), width)`.

        Raises:
            RequestError: an id is outside the vocabulary.
            BundleError: the file has become shorter.
            EdgeError: it cannot be read.
        """
        self._check(ids)
        distinct = ids if len(ids) == 1 else sorted(set(ids))
        with np.errstate(over="ignore", invalid="ignore"):  # as onnxruntime
            embeddings = self._dequantized(distinct)[:, : self._spec.width]
            embeddings *= self._scale
        if len(ids) == 1:
            return embeddings
        place = {token: i for i, token in enumerate(distinct)}
        return embeddings[[place[token] for token in ids]]

    def low_plane(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the low plane of some rows of a table in two planes, as integers and their
        scales.

        Args:
            ids: of the tokens.

        Returns:
            int8 `(len(ids), blocks * block_size)`, zero points subtracted, and float32
            `(len(ids), blocks)`.

        Raises:
            RequestError, BundleError, EdgeError: as `rows`.
        """
        self._check(ids)
        zero_points = self._levels(self._read("zero_points", ids))[:, : self._spec.blocks, None]
        levels = self._levels(self._read("low", ids))
        numbers = levels.reshape(len(ids), -1, self._spec.block_size) - zero_points
        return numbers.reshape(levels.shape).astype(np.int8), self._read("scales", ids)

    def _check(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self._spec.rows:
                raise RequestError(
                    f"token id {token} is outside the vocabulary of {self._spec.rows:,}"
                )

    def _dequantized(self, ids: Sequence[int]) -> np.ndarray:
        """Returns rows before the embedding scale: float32 `(len(ids), width or more)`."""
        spec = self._spec
        if not spec.block_size:
            return self._read("rows", ids).astype(np.float32)
        if spec.by_rows:
            numbers = self._read("quantized", ids).astype(np.float32)
            numbers *= self._read("scales", ids)
            numbers *= self._columns
            return numbers
        scales = self._read("scales", ids)[..., None]
        zero_points = self._middle
        if not spec.symmetric:
            zero_points = self._levels(self._read("zero_points", ids))[:, : spec.blocks, None]
        if spec.planes == 1:
            return self._numbers("quantized", ids, scales, zero_points)
        found = self._numbers("high", ids, scales, self._middle)
        found *= _LOW_PLANE_STEPS
        found += self._numbers("low", ids, scales, zero_points)
        return found

    def _numbers(
        self,
        part: str,
        ids: Sequence[int],
        scales: np.ndarray,
        zero_points: np.ndarray | np.float32,
    ) -> np.ndarray:
        """Returns the values of a part's quantized numbers: float32 `(n, blocks * block_size)`."""
        levels = self._levels(self._read(part, ids))
        blocks = levels.reshape(len(ids), -1, self._spec.block_size)
        blocks -= zero_points
        blocks *= scales
        return levels

    def _levels(self, packed: np.ndarray) -> np.ndarray:
        """Levels of bytes: float32 `(n, levels)`."""
        return self._levels_of_byte.take(packed, axis=0, mode="clip").reshape(len(packed), -1)

    def _read(self, part: str, ids: Sequence[int]) -> np.ndarray:
        """One part of some rows, `(n, entries)`."""
        offset, dtype, size = self._places[part]
        try:
            data = b"".join([os.pread(self._file, size, offset + size * int(i)) for i in ids])
        except OSError as error:
            raise EdgeError(f"{self._path} cannot be read: {error.strerror}") from error
        if len(data) != len(ids) * size:
            raise BundleError(
                f"{self._path} is too short for its embeddings: the file has changed since "
                "it was opened; export or copy the bundle again"
            )
        return np.frombuffer(data, dtype).reshape(len(ids), -1)


def _levels_of_byte(bits: int) -> np.ndarray:
    """The levels in each byte, the first in its lowest bits: float32 `(256, 8 / bits)`."""
    shifts = np.arange(0, 8, bits)
    return (np.arange(256)[:, None] >> shifts & (1 << bits) - 1).astype(np.float32)
