"""Reads one GGUF file: its metadata at once, its tensors on demand.

The `gguf` package supplies the constants and the dequantization of every tensor type. Its
`GGUFReader` is not used. It makes four small arrays for each of the 262 144 vocabulary entries (10
s for the sample model, against 0.3 s here). It also does not check what a file declares.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import reprlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_keras.checkpoints.first_bytes import explain_pointer
from gemma_keras.checkpoints.quantized_grid import GGUF_TYPES, QuantizedGrid
from gemma_keras.errors import CheckpointError

_SCALARS: dict[int, tuple[str, type | str]] = {
    0: ("B", "u1"),
    1: ("b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_STRING, _ARRAY = 8, 9
_MAX_KEY, _MAX_TENSOR_NAME = 1 << 16, 1 << 8
_MAX_ALIGNMENT = 1 << 20
_DEQUANTIZE_BYTES = 256 << 10  # a chunk and its float32 values fit into the processor's cache


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor: row-major shape, ggml type, first byte and length in the file."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int
    num_bytes: int


class GGUFFile:
    """A GGUF file, mapped; its header is checked whole before any tensor is touched.

    Attributes:
        metadata: key to value.
        tensors: name to `TensorInfo`.

    Raises:
        CheckpointError: not a file, not GGUF, truncated, or its declared sizes exceed the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not self.path.is_file():
                raise CheckpointError(f"{self.path} is not a file")
            with self.path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise CheckpointError(
                        f"{self.path} is not a GGUF file: it has {self.size} bytes"
                    )
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        header = _Header(self._bytes, self.path)
        magic, version, num_tensors, num_keys = struct.unpack_from("<4sIQQ", self._bytes)
        if magic != b"GGUF":
            raise CheckpointError(
                explain_pointer(self.path)
                or f"{self.path} is not a GGUF file: it begins with {magic!r}"
            )
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF; only little-endian is supported"
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; only versions 2 and 3 are supported"
            )
        header.position = 24
        self.metadata = header.read_metadata(num_keys)
        infos = header.read_tensor_infos(num_tensors)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
            raise CheckpointError(
                f"{self.path} declares an alignment of {reprlib.repr(alignment)}; it must be a "
                f"multiple of 8 up to {_MAX_ALIGNMENT}"
            )
        data = -(-header.position // alignment) * alignment
        self.tensors = {
            name: self._locate(name, dims, kind, data + offset)
            for name, (dims, kind, offset) in infos.items()
        }

    def _locate(self, name: str, dims: list[int], kind: int, start: int) -> TensorInfo:
        try:
            tensor_type = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(
                f"tensor {name} of {self.path} has type {kind}, which the gguf package does "
                "not know"
            ) from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        if dims[0] % block:
            raise CheckpointError(
                f"tensor {name} of {self.path} has rows of {dims[0]} numbers, which is not "
                f"a multiple of {tensor_type.name}'s block size {block}"
            )
        num_bytes = math.prod(dims) // block * block_bytes
        if start + num_bytes > self.size:
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name} ends at byte "
                f"{start + num_bytes:,}, but the file has {self.size:,}"
            )
        return TensorInfo(tuple(reversed(dims)), tensor_type, start, num_bytes)

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, row-major.

        Raises:
            CheckpointError: the `gguf` package cannot dequantize its type.
        """
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Returns rows `first` to `last` of the tensor's first axis; reads no other rows.

        A tensor of one axis can only be read whole.
        """
        info = self.tensors[name]
        shape = (last - first, *info.shape[1:])
        # Rows are whole blocks, along the last axis.
        start, end = (row * info.num_bytes // info.shape[0] for row in (first, last))
        raw = np.frombuffer(self._bytes, np.uint8, end - start, info.start + start)
        if info.type == gguf.GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(shape)
        # A tensor is a run of independent blocks, so it can be dequantized in long stretches; the
        # package's own grouping by 16 rows costs five times as much on the embedding.
        block, block_bytes = gguf.GGML_QUANT_SIZES[info.type]
        out = np.empty(math.prod(shape), np.float32)
        step = max(1, _DEQUANTIZE_BYTES // block_bytes)
        try:
            for block_number in range(0, len(raw) // block_bytes, step):
                chunk = raw[block_number * block_bytes : (block_number + step) * block_bytes]
                # Whether the values are finite is for the caller to judge, not numpy's warnings.
                with np.errstate(over="ignore", invalid="ignore"):
                    values = gguf.dequantize(chunk.reshape(1, -1), info.type)
                place = block_number * block
                out[place : place + values.size] = values.ravel()
        except NotImplementedError:
            raise CheckpointError(
                f"tensor {name} is of type {info.type.name}, which the gguf package cannot "
                "dequantize; convert the file to another type"
            ) from None
        return out.reshape(shape)

    def stored_as(self, name: str) -> str | None:
        """Returns the tensor's quantized type, such as `Q4_K`; `None` for floats."""
        kind = self.tensors[name].type
        return kind.name if gguf.GGML_QUANT_SIZES[kind][0] > 1 else None

    def grid(self, name: str) -> QuantizedGrid | None:
        """The tensor's integers and scales, its last axis the inputs; `None` if its type is not one
        of `GGUF_TYPES`.

        Its `values()` are to the bit what `read` gives. Scales and offsets may be infinite or NaN.
        """
        info = self.tensors[name]
        kind = GGUF_TYPES.get(info.type.name)
        if kind is None:
            return None
        length, block_bytes = gguf.GGML_QUANT_SIZES[info.type]
        raw = np.frombuffer(self._bytes, np.uint8, info.num_bytes, info.start)
        raw = raw.reshape(-1, block_bytes)
        per_block = length // kind.block_size
        levels = np.empty((len(raw), length), np.uint8)
        scales = np.empty((len(raw), per_block), np.float32)
        offsets: np.ndarray | None = None
        step = max(1, _DEQUANTIZE_BYTES // block_bytes)
        for first in range(0, len(raw), step):
            chunk = slice(first, first + step)
            with np.errstate(invalid="ignore"):
                blocks = kind.decode(raw[chunk])
            levels[chunk], scales[chunk] = blocks.levels, blocks.scales
            if blocks.offsets is not None:
                offsets = np.empty_like(scales) if offsets is None else offsets
                offsets[chunk] = blocks.offsets
        num_inputs = info.shape[-1]
        scales = scales.reshape(-1, num_inputs // kind.block_size)
        return QuantizedGrid(
            levels.reshape(-1, num_inputs),
            scales,
            np.broadcast_to(np.int16(kind.zero_point), scales.shape),
            None if offsets is None else offsets.reshape(scales.shape),
            kind.bits,
            kind.block_size,
        )


class _Header:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    def _advance(self, num_bytes: int) -> int:
        start = self.position
        if num_bytes > len(self._data) - start:
            raise CheckpointError(
                f"{self._path} is truncated or corrupt: its header refers to {num_bytes:,} "
                f"bytes at {start:,}, but the file has {len(self._data):,}"
            )
        self.position = start + num_bytes
        return start

    def _scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self._data, self._advance(struct.calcsize(form)))[0]

    def _string(self, longest: int | None = None) -> str:
        length = self._scalar("<Q")
        start = self._advance(length)
        if longest is not None and length > longest:
            raise CheckpointError(
                f"{self._path} is corrupt: it has a name of {length:,} bytes at {start:,}, "
                f"but the limit is {longest:,}"
            )
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self._path} is corrupt: the {length:,} bytes of text at {start:,} are not UTF-8"
            ) from None

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind][0])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, count = self._scalar("<I"), self._scalar("<Q")
            if item_kind in _SCALARS:
                dtype = np.dtype(_SCALARS[item_kind][1])
                start = self._advance(count * dtype.itemsize)
                return np.frombuffer(self._data, dtype, count, start).tolist()
            if item_kind == _STRING:
                self._check_count(count, 8)
                return [self._string() for _ in range(count)]
            raise CheckpointError(
                f"{self._path} has an array of type {item_kind}, which is not supported"
            )
        raise CheckpointError(f"{self._path} is corrupt: it has a value of unknown type {kind}")

    def _check_count(self, count: int, least_bytes: int) -> None:
        """Raise an error for a count that the rest of the file cannot hold, before looping over
        it."""
        if count * least_bytes > len(self._data) - self.position:
            raise CheckpointError(
                f"{self._path} is truncated or corrupt: it declares {count:,} entries in "
                f"{len(self._data) - self.position:,} bytes"
            )

    def read_metadata(self, count: int) -> dict[str, Any]:
        self._check_count(count, 13)
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(_MAX_KEY)
            if key in metadata:
                raise CheckpointError(f"{self._path} is corrupt: {key[:80]} occurs twice")
            metadata[key] = self._value(self._scalar("<I"))
        return metadata

    def read_tensor_infos(self, count: int) -> dict[str, tuple[list[int], int, int]]:
        self._check_count(count, 32)
        infos: dict[str, tuple[list[int], int, int]] = {}
        for _ in range(count):
            name = self._string(_MAX_TENSOR_NAME)
            if name in infos:
                raise CheckpointError(f"{self._path} is corrupt: tensor {name} occurs twice")
            num_dims = self._scalar("<I")
            if not 1 <= num_dims <= 4:
                raise CheckpointError(
                    f"{self._path} is corrupt: tensor {name} has {num_dims} dimensions"
                )
            dims = [self._scalar("<Q") for _ in range(num_dims)]
            if not all(0 < d < 1 << 40 for d in dims):
                raise CheckpointError(
                    f"{self._path} is corrupt: tensor {name} has dimensions {dims}"
                )
            infos[name] = (dims, self._scalar("<I"), self._scalar("<Q"))
        return infos
