"""Reads the quantized weights of a checkpoint as integers with scales (`QuantizedGrid`).

Weights of 4 or 8 bits have already been rounded once, sometimes by training (Gemma's QAT
checkpoints). Read as floats they would be rounded again at export. Read as integers and scales they
can be stored unchanged.

GGUF's block layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class QuantizedGrid:
    """A matrix or table of values `(level - zero_point) * scale + offset`, as its source holds it.

    Attributes:
        levels: uint8 `[rows, inputs]`, each below `2 ** bits`; a row is an output of a matrix, a
            token of a table.
        scales: float32 `[rows, blocks]`; may be negative.
        zero_points: int16 `[rows, blocks]`, often one number broadcast.
        offsets: float32 `[rows, blocks]`, or `None` where there are none. GGUF's types with a
            minimum add a float that is seldom a multiple of the scale.
        bits: of a level.
        block_size: inputs that share a scale; the last block of a row may be shorter.
    """

    levels: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    offsets: np.ndarray | None
    bits: int
    block_size: int

    @property
    def num_inputs(self) -> int:
        """Length of a row."""
        return self.levels.shape[1]

    def rows(self, rows: slice) -> QuantizedGrid:
        """Some of the rows, as views."""
        return dataclasses.replace(
            self,
            levels=self.levels[rows],
            scales=self.scales[rows],
            zero_points=self.zero_points[rows],
            offsets=None if self.offsets is None else self.offsets[rows],
        )

    def values(self) -> np.ndarray:
        """Returns the dequantized values, float32 `[rows, inputs]`, bit-identical to the source's
        floats."""
        values = self.levels.astype(np.float32)
        values -= self._by_input(self.zero_points)
        values *= self._by_input(self.scales)
        if self.offsets is not None:
            values += self._by_input(self.offsets)
        return values

    def _by_input(self, of_blocks: np.ndarray) -> np.ndarray:
        return np.repeat(of_blocks, self.block_size, axis=1)[:, : self.num_inputs]


@runtime_checkable
class GridSource(Protocol):
    """Weights by canonical name, some of which are quantized."""

    def stored_as(self, name: str) -> str | None:
        """Returns the name of a weight's quantized type in the source; `None` for floats."""
        ...

    def grid(self, name: str) -> QuantizedGrid | None:
        """Returns a weight as a `QuantizedGrid`; `None` if it is not on a supported grid."""
        ...


# --- GGUF ----------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Some blocks of a GGUF type, decoded: levels uint8 `[n, length]`, scales and offsets float32
    `[n, length / block_size]`."""

    levels: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None


class GGUFType(NamedTuple):
    """How a GGUF type decodes: what a `QuantizedGrid` says of it, and the decoder of its raw
    blocks, uint8 `[n, bytes]`."""

    bits: int
    block_size: int
    zero_point: int
    decode: Callable[[np.ndarray], Blocks]


def _halves(raw: np.ndarray) -> np.ndarray:
    """float16 numbers in the last axis, as float32."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """The low halves of the bytes of the last axis, then the high ones."""
    return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """32 bits, the first in the lowest bit of the first of 4 bytes, each as 0 or 16."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(raw: np.ndarray) -> Blocks:
    return Blocks(_nibbles(raw[:, 2:18]), _halves(raw[:, :2]), None)


def _q4_1(raw: np.ndarray) -> Blocks:
    return Blocks(_nibbles(raw[:, 4:20]), _halves(raw[:, :2]), _halves(raw[:, 2:4]))


def _q5_0(raw: np.ndarray) -> Blocks:
    levels = _nibbles(raw[:, 6:22]) | _fifth_bits(raw[:, 2:6])
    return Blocks(levels, _halves(raw[:, :2]), None)


def _q5_1(raw: np.ndarray) -> Blocks:
    levels = _nibbles(raw[:, 8:24]) | _fifth_bits(raw[:, 4:8])
    return Blocks(levels, _halves(raw[:, :2]), _halves(raw[:, 2:4]))


def _q8_0(raw: np.ndarray) -> Blocks:
    # the sign bit flipped is 128 added: int8 about 0 becomes uint8 about 128
    return Blocks(raw[:, 2:34] ^ np.uint8(128), _halves(raw[:, :2]), None)


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and negated offsets of the 8 sub-blocks of Q4_K and Q5_K: both float32 `[n, 8]`.

    Two halves, then 12 bytes of 6-bit factors: bytes 0 to 3 hold scales 0 to 3, bytes 4 to 7
    minima 0 to 3; bytes 8 to 11 hold the low four bits of scales (low half) and minima (high half)
    4 to 7, whose upper two bits are the upper two of bytes 0 to 3 and 4 to 7.
    """
    first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    high = np.uint8(0x30)
    factors = np.concatenate([first & np.uint8(63), third & np.uint8(15) | first >> 2 & high], 1)
    minima = np.concatenate([second & np.uint8(63), third >> np.uint8(4) | second >> 2 & high], 1)
    return _halves(raw[:, :2]) * factors, _halves(raw[:, 2:4]) * minima


def _q4_k(raw: np.ndarray) -> Blocks:
    scales, minima = _k_scales(raw)
    # 32 bytes are 64 levels: a sub-block in their low halves, the next in their high ones
    levels = _nibbles(raw[:, 16:144].reshape(-1, 4, 32))
    return Blocks(levels.reshape(-1, 256), scales, -minima)


def _q5_k(raw: np.ndarray) -> Blocks:
    scales, minima = _k_scales(raw)
    levels = _nibbles(raw[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # bit k of 32 bytes is the fifth bit of sub-block k
    planes = np.arange(8, dtype=np.uint8)[:, None]
    levels |= (raw[:, None, 16:48] >> planes & np.uint8(1)) << np.uint8(4)
    return Blocks(levels.reshape(-1, 256), scales, -minima)


def _q6_k(raw: np.ndarray) -> Blocks:
    # each half of the block: 64 bytes of low nibbles, 32 bytes of four times two upper bits
    low = _nibbles(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)
    levels = low | upper << np.uint8(4)
    scales = _halves(raw[:, 208:210]) * raw[:, 192:208].view(np.int8)
    return Blocks(levels.reshape(-1, 256), scales, None)


GGUF_TYPES: dict[str, GGUFType] = {
    "Q4_0": GGUFType(4, 32, 8, _q4_0),
    "Q4_1": GGUFType(4, 32, 0, _q4_1),
    "Q5_0": GGUFType(5, 32, 16, _q5_0),
    "Q5_1": GGUFType(5, 32, 0, _q5_1),
    "Q8_0": GGUFType(8, 32, 128, _q8_0),
    "Q4_K": GGUFType(4, 32, 0, _q4_k),
    "Q5_K": GGUFType(5, 32, 0, _q5_k),
    "Q6_K": GGUFType(6, 16, 32, _q6_k),
}
