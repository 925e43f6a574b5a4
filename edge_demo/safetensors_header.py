"""The header of a safetensors file: names, types, shapes and places, as JSON.

Source: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

LENGTH_BYTES = 8  # of the header's length, which stands before it


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: its key.
        dtype: its type as safetensors names it, such as `F32`.
        shape: its dimensions.
        num_bytes: of its data.
    """

    name: str
    dtype: str
    shape: Sequence[int]
    num_bytes: int


def header_of(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header of tensors that lie one after another."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return header


def encode_header(header: Mapping[str, Any]) -> bytes:
    """The length and the text of a header, padded with spaces so that tensors begin aligned."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
