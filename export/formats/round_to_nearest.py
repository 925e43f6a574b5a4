"""Rounds weights to nearest, without calibration.

The scale of a block determines its error. `round_to_nearest` uses the scale that covers the block's
extremes. `search_scales` tries smaller ones, which clip a little and round more finely.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from export.formats.formats import Format
from export.formats.packing import Quantized, blocks_of, zero_points_in_planes

_SMALLEST_SCALE = np.float32(1e-37)  # below it the inverse overflows, and the block is all zeros
_CHUNK_BYTES = 8 << 20  # rows that fit a cache
_SHRINKS = np.linspace(1.0, 0.70, 13, dtype=np.float32)


def round_to_nearest(rows: np.ndarray, fmt: Format) -> Quantized:
    """Round each value to the nearest level of a grid that reaches its block's extremes.

    * 8 bits symmetric: the scale is the largest magnitude / 127. A GGUF Q8_0 tensor keeps its
      scales and integers exactly.
    * 8 bits in two planes: the same values; the scale is negative where that gives the high plane
      its middle as the zero point, or brings it nearer.
    * 2 and 4 bits symmetric: the scale maps the value of largest magnitude to the lowest level, as
      in GGUF's Q4_0; it may be negative.
    * asymmetric: from the smallest to the largest value, including 0, with 0 exact.

    Args:
        rows: float32 `[outputs, inputs]`.
        fmt: a quantized one.
    """
    return _by_chunks(rows, fmt, lambda blocks: _quantize(blocks, *_reaching(blocks, fmt), fmt))


def search_scales(rows: np.ndarray, fmt: Format, importance: np.ndarray | None = None) -> Quantized:
    """Round to nearest with, in each block, the scale of least squared error among narrower ones.

    Args:
        rows: float32 `[outputs, inputs]`.
        fmt: a quantized one.
        importance: weight of each input's squared error, float32 `[inputs]`, such as the mean
            square of the activation it multiplies; all equal by default.
    """
    weight = np.ones(rows.shape[1], np.float32) if importance is None else importance
    weight = blocks_of(weight[None], fmt.block_size)[0]

    def best(blocks: np.ndarray) -> Quantized:
        scales, zeros = best_scales(blocks, weight, fmt)
        return _quantize(blocks, scales, zeros, fmt)

    return _by_chunks(rows, fmt, best)


def best_scales(
    blocks: np.ndarray, weight: np.ndarray, fmt: Format
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales, and zero points if the format has them, of least weighted squared error.

    Args:
        blocks: float32 `[rows, blocks, block_size]`.
        weight: of each input, broadcast to `blocks`.
        fmt: a quantized one.

    Returns:
        float32 and uint8 (or `None`) `[rows, blocks]`.
    """
    full, full_zeros = _reaching(blocks, fmt)
    scales, zeros = full, full_zeros
    least = np.full(full.shape, np.inf, np.float32)
    for shrink in _SHRINKS:
        tried = full * shrink
        levels = _levels(blocks, tried, full_zeros, fmt)
        zero = _zero(full_zeros, fmt)
        signed = levels - zero
        # the scale that fits these levels best, in closed form
        dot = (weight * blocks * signed).sum(axis=-1)
        square = (weight * signed * signed).sum(axis=-1)
        fitted = np.divide(dot, square, out=tried.copy(), where=square > 0)
        error = (weight * (blocks - signed * fitted[..., None]) ** 2).sum(axis=-1)
        better = error < least
        least = np.where(better, error, least)
        scales = np.where(better, fitted, scales)
    return scales, zeros


def _by_chunks(
    rows: np.ndarray, fmt: Format, quantize: Callable[[np.ndarray], Quantized]
) -> Quantized:
    num_rows, num_inputs = rows.shape
    num_blocks = fmt.num_blocks(num_inputs)
    levels = np.empty((num_rows, num_blocks, fmt.block_size), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.float32)
    zeros = None if fmt.symmetric else np.empty((num_rows, num_blocks), np.uint8)
    step = max(1, _CHUNK_BYTES // max(1, num_blocks * fmt.block_size * 4))
    for first in range(0, num_rows, step):
        chunk = quantize(blocks_of(rows[first : first + step], fmt.block_size))
        levels[first : first + step] = chunk.levels
        scales[first : first + step] = chunk.scales
        if zeros is not None and chunk.zero_points is not None:
            zeros[first : first + step] = chunk.zero_points
    return Quantized(levels, scales, zeros)


def _reaching(blocks: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zero points with which the grid reaches the extremes of each block."""
    least, greatest = blocks.min(axis=-1), blocks.max(axis=-1)
    if fmt.bits == 8 and (fmt.symmetric or fmt.planes == 2):
        scales = np.maximum(greatest, -least) / np.float32(127)
        if fmt.planes == 1:
            return scales, None
        inverse = _inverse(scales)
        turned = (np.rint(greatest * inverse) > 119) & (-least < greatest)
        reached = np.rint(np.where(turned, -least, greatest) * inverse)
        return np.where(turned, -scales, scales), zero_points_in_planes(reached)
    if not fmt.symmetric:
        least, greatest = np.minimum(least, 0), np.maximum(greatest, 0)
        steps = np.float32((1 << fmt.bits) - 1)
        scales = greatest / steps - least / steps  # the difference itself may overflow
        zeros = np.rint(-least * _inverse(scales))
        return scales, np.clip(zeros, 0, steps).astype(np.uint8)
    extreme = np.where(greatest > -least, greatest, least)
    return extreme / np.float32(-fmt.middle), None


def _quantize(
    blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, fmt: Format
) -> Quantized:
    return Quantized(_levels(blocks, scales, zeros, fmt).astype(np.uint8), scales, zeros)


def _levels(
    blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, fmt: Format
) -> np.ndarray:
    """The nearest levels, as float32."""
    lowest, highest = int(fmt.bits == 8 and fmt.symmetric), (1 << fmt.bits) - 1
    levels = np.asarray(np.rint(blocks * _inverse(scales)[..., None]))
    levels += _zero(zeros, fmt)
    return np.clip(levels, lowest, highest, out=levels)


def _zero(zeros: np.ndarray | None, fmt: Format) -> np.ndarray:
    return np.asarray(fmt.middle if zeros is None else zeros[..., None], np.float32)


def _inverse(scales: np.ndarray) -> np.ndarray:
    """`1 / scale`, and 0 where a block is so small that its scale underflows: it becomes zeros."""
    usable = np.abs(scales) > _SMALLEST_SCALE
    return np.divide(1, scales, out=np.zeros_like(scales), where=usable)
