"""Finds the weights that a graph reads, and how, from the ONNX file without onnx or onnxruntime.

ONNX files are protocol buffers. The few fields needed here are read by their field numbers in
`onnx.proto3` (github.com/onnx/onnx). A truncated or malformed file raises `BundleError`.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path

from edge_demo.errors import BundleError

# Operators that look up rows of a table; the latter in tables of rotary angles.
_LOOKUPS = ("Gather", "GroupQueryAttention")
ARM = ("aarch64", "arm64")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """One tensor of the weights file, as a graph uses it.

    Attributes:
        name: in the graph.
        shape: as stored, so packed integers are counted in bytes.
        offset: where it begins in the weights file, in bytes.
        num_bytes: its size there.
        used_by: the operators that read it.
        bits: of the integers of a product with blocks that reads it; 0 if none does.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    used_by: frozenset[str]
    bits: int = 0

    @property
    def looked_up(self) -> bool:
        """Whether single rows of it are looked up, as in an embedding table."""
        return any(operator.startswith(_LOOKUPS) for operator in self.used_by)

    @property
    def multiplied(self) -> bool:
        """Whether all of it is read, for example in a matrix product."""
        return not all(operator.startswith(_LOOKUPS) for operator in self.used_by)

    def read_bytes(self, machine: str) -> int:
        """What a product reads of it, in bytes, on a processor as Python names it.

        On ARM without `i8mm` onnxruntime keeps two sums beside each scale of a block of 8 bits, and
        reads them for each token.
        """
        sums = self.bits == 8 and machine in ARM and self.name.endswith(".scales")
        return self.num_bytes * (3 if sums else 1)


def stored_weights(path: Path) -> list[StoredWeight]:
    """Returns the weights in the weights file that a graph uses.

    Raises:
        BundleError: the file is not a valid ONNX graph.
    """
    try:
        return list(_stored_weights(path.read_bytes()))
    except (IndexError, ValueError, KeyError) as error:
        raise BundleError(f"{path} is not a valid ONNX graph: {error}") from error


def bytes_per_token(path: Path, machine: str | None = None) -> int:
    """Returns the bytes of weights that one decode step reads: all except tables whose rows are
    looked up.

    Args:
        path: of the graph.
        machine: the processor, as `platform.machine` names it; this one by default.

    Raises:
        BundleError: the file is not a valid ONNX graph.
    """
    machine = machine or platform.machine()
    read = {w.offset: w.read_bytes(machine) for w in stored_weights(path) if w.multiplied}
    return sum(read.values())  # a place that two shapes share is read once


def _stored_weights(data: bytes) -> Iterator[StoredWeight]:
    view = memoryview(data)
    graphs = [value for number, value in _fields(view) if number == 7]
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise ValueError("it contains no graph")
    users: dict[str, set[str]] = {}
    bits: dict[str, int] = {}
    tensors: list[memoryview] = []
    for number, value in _fields(graphs[0]):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            node = list(_fields(value))
            operator = next((_text(v) for n, v in node if n == 4), "")
            width = _attribute(node, "bits") if operator == "MatMulNBits" else 0
            for name in (_text(v) for n, v in node if n == 1):
                users.setdefault(name, set()).add(operator)
                bits[name] = max(bits.get(name, 0), width)
        elif number == 5:
            tensors.append(value)
    for tensor in tensors:
        name, shape, place = "", [], {}
        for number, value in _fields(tensor):
            if number == 1:
                shape += [value] if isinstance(value, int) else _varints(value)
            elif number == 8:
                name = _text(value)
            elif number == 13:
                entry = dict(_fields(value)) if isinstance(value, memoryview) else {}
                place[_text(entry[1])] = _text(entry[2])
        if place and name in users:
            offset, length = int(place.get("offset", "0")), int(place["length"])
            used_by = frozenset(users[name])
            yield StoredWeight(name, tuple(shape), offset, length, used_by, bits[name])


def _attribute(node: list[tuple[int, int | memoryview]], wanted: str) -> int:
    """An integer attribute of a node; 0 if it has none of that name."""
    for number, value in node:
        if number == 5 and isinstance(value, memoryview):
            entry = dict(_fields(value))
            if _text(entry[1]) == wanted and isinstance(found := entry.get(3, 0), int):
                return found
    return 0


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of one message."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == _BYTES:
            size, place = _varint(data, place)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"it has a field of the unknown wire type {kind}")
        if place + size > len(data):
            raise ValueError("the file is truncated")
        yield number, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("it has a variable-length integer that is too long")


def _varints(data: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(data):
        value, place = _varint(data, place)
        values.append(value)
    return values


def _text(value: int | memoryview) -> str:
    if isinstance(value, int):
        raise ValueError("it has a number where a name is expected")
    return bytes(value).decode("utf-8")
