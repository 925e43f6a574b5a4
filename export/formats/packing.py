"""Packs integers with scales into the bytes that onnxruntime's operators read.

`MatMulNBits` and `GatherBlockQuantized` compute `value = (level - zero_point) * scale`. Levels have
2, 4 or 8 bits, the first one in the lowest bits of a byte. Source: onnxruntime,
ContribOperators.md.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from export.formats.formats import Format


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix or table on a grid, a level a byte.

    Attributes:
        levels: uint8 `[rows, blocks, block_size]`, each below `2 ** bits`.
        scales: float32 `[rows, blocks]`; may be negative.
        zero_points: uint8 `[rows, blocks]`, or `None` where all are the format's middle.
    """

    levels: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None

    def values(self, fmt: Format, num_inputs: int) -> np.ndarray:
        """Returns the dequantized values: float32 `[rows, num_inputs]`."""
        zero = fmt.middle if self.zero_points is None else self.zero_points[..., None]
        levels = self.levels.astype(np.float32) - np.asarray(zero, np.float32)
        return (levels * self.scales[..., None]).reshape(len(levels), -1)[:, :num_inputs]


def blocks_of(rows: np.ndarray, block_size: int) -> np.ndarray:
    """Cut float rows `[rows, inputs]` into `[rows, blocks, block_size]`, padded with zeros."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    padding = -rows.shape[1] % block_size
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    return rows.reshape(len(rows), -1, block_size)


def pack_bits(levels: np.ndarray, bits: int) -> np.ndarray:
    """Pack small integers, the first in the lowest bits.

    Args:
        levels: uint8, each below `2 ** bits`; the last axis is padded with zeros to whole bytes.
        bits: 2, 4 or 8.

    Returns:
        uint8, the last axis `8 / bits` times shorter.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return np.ascontiguousarray(levels)
    padding = -levels.shape[-1] % per_byte
    if padding:
        levels = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, padding)])
    packed = levels[..., ::per_byte].copy()
    for i in range(1, per_byte):
        packed |= levels[..., i::per_byte] << np.uint8(i * bits)
    return packed


def unpack_bits(packed: np.ndarray, bits: int, length: int) -> np.ndarray:
    """The inverse of `pack_bits`: the first `length` integers of the last axis."""
    per_byte = 8 // bits
    mask = np.uint8((1 << bits) - 1)
    parts = [(packed >> np.uint8(i * bits)) & mask for i in range(per_byte)]
    shape = *packed.shape[:-1], packed.shape[-1] * per_byte
    return np.stack(parts, axis=-1).reshape(shape)[..., :length]


def zero_points_in_planes(greatest: np.ndarray) -> np.ndarray:
    """The zero point of each block in two planes, 128 to 136.

    It is 136 if possible: the high plane is then the best 4-bit approximation. A block with values
    above 119 has a lower one.

    Args:
        greatest: the block's largest value, as a multiple of its scale; at most 127.
    """
    return (128 + np.clip(127 - greatest, 0, 8)).astype(np.uint8)


def split_planes(
    levels: np.ndarray, zero_points: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split 8-bit levels `l` with zero points `z` into 4 bits: `l - z = 16 (h - 8) + (w - y)`.

    Args:
        levels: uint8.
        zero_points: uint8, 128 to 143.

    Returns:
        The high plane `h`, the low plane `w` and the low one's zero points `y`.
    """
    if zero_points.size and not 128 <= zero_points.min() <= zero_points.max() <= 143:
        raise ValueError("in two planes of 4 bits zero points are 128 to 143")
    return levels >> np.uint8(4), levels & np.uint8(15), zero_points - np.uint8(128)


def stored_tensors(quantized: Quantized, fmt: Format) -> dict[str, np.ndarray]:
    """Returns the arrays for the weights file: part name to array.

    By rows, as `QGemm` takes them: int8 `[rows, inputs]` around 0, and scales `[rows]`.
    """
    if fmt.by_rows:
        levels = quantized.levels.reshape(len(quantized.levels), -1)
        signed = (levels ^ np.uint8(fmt.middle)).view(np.int8)
        return {"quantized": signed, "scales": quantized.scales.reshape(-1)}
    if fmt.planes == 2:
        assert quantized.zero_points is not None
        halves = split_planes(quantized.levels, quantized.zero_points)
        parts = dict(zip(("high", "low", "zero_points"), halves, strict=True))
    else:
        parts = {"quantized": quantized.levels}
        if quantized.zero_points is not None:
            parts["zero_points"] = quantized.zero_points
    bits = fmt.bits // fmt.planes
    packed = {part: pack_bits(levels, bits) for part, levels in parts.items()}
    return packed | {"scales": quantized.scales}
