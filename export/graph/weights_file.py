"""Writes the bundle's weights file, to which tensors are appended and which all graphs share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

# Large tensors begin on a page, so that a runtime can map them one by one.
_PAGE = 4096
_SMALL = 64


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in the weights file."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class WeightsFile:
    """A weights file being written; a context manager.

    Attributes:
        tensors: name to `StoredTensor`, in the order written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        self._file = path.open("wb")
        self._position = 0

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor under a new name."""
        self.reserve(name, array.dtype, array.shape)
        self.write_rows(name, 0, array)

    def reserve(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """Append room for a tensor under a new name, to be filled by `write_rows`."""
        if name in self.tensors:
            raise ValueError(f"{name} is already stored")
        num_bytes = math.prod(shape) * dtype.itemsize
        offset = self._position + -self._position % (_PAGE if num_bytes >= _PAGE else _SMALL)
        self._position = offset + num_bytes
        self.tensors[name] = StoredTensor(ir.DataType.from_numpy(dtype), shape, offset, num_bytes)

    def write_rows(self, name: str, first: int, rows: np.ndarray) -> None:
        """Fill a reserved tensor from its row `first` on."""
        stored = self.tensors[name]
        data = np.ascontiguousarray(rows)
        row_bytes = stored.num_bytes // stored.shape[0] if stored.shape else stored.num_bytes
        self._file.seek(stored.offset + first * row_bytes)
        self._file.write(data.reshape(-1).view(np.uint8).data)

    def add_view(self, name: str, of: str, shape: tuple[int, ...]) -> None:
        """Name the bytes of a stored tensor a second time, under another shape."""
        stored = self.tensors[of]
        if math.prod(shape) != math.prod(stored.shape):
            raise ValueError(f"{name}: {shape} and {stored.shape} have different sizes")
        self.tensors[name] = dataclasses.replace(stored, shape=shape)

    def add_rows(self, name: str, of: str, first: int, count: int) -> None:
        """Name some rows of a stored tensor as a tensor of their own."""
        stored = self.tensors[of]
        row_bytes = stored.num_bytes // stored.shape[0]
        self.tensors[name] = StoredTensor(
            stored.dtype,
            (count, *stored.shape[1:]),
            stored.offset + first * row_bytes,
            count * row_bytes,
        )

    def initializer(
        self,
        name: str,
        dtype: ir.DataType | None = None,
        shape: Sequence[int] | None = None,
        label: str | None = None,
    ) -> ir.Value:
        """A graph initializer that points at the stored tensor.

        Args:
            name: of the tensor.
            dtype: to read its bytes as another type, such as 4-bit integers.
            shape: to read its bytes in another shape.
            label: its name in the graph, if that is another.
        """
        stored = self.tensors[name]
        dtype = stored.dtype if dtype is None else dtype
        shape = stored.shape if shape is None else tuple(shape)
        if math.ceil(math.prod(shape) * dtype.bitwidth / 8) != stored.num_bytes:
            raise ValueError(f"{name}: {dtype.name} {shape} does not have {stored.num_bytes} bytes")
        tensor = ir.ExternalTensor(
            self.path.name,
            stored.offset,
            stored.num_bytes,
            dtype,
            shape=ir.Shape(shape),
            name=label or name,
            base_dir=self.path.parent,
        )
        return ir.val(label or name, dtype, shape, const_value=tensor)
