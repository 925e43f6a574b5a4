"""Rounds with error feedback (GPTQ): later inputs compensate the rounding error of each input.

For a matrix `W` with inputs `x`, the loss is the mean of `|(W - Q) x|²`. It depends on the text
only through `H = mean(x xᵀ)`. Inputs are rounded one after the other. The inputs that are not yet
rounded are changed to compensate the error of input j:

    W[:, k] -= (W[:, j] - Q[:, j]) / U[j, j] * U[j, k]    for k after j, with H⁻¹ = Uᵀ U

Frantar et al., 2022, GPTQ, arXiv:2210.17323. Inputs go in order of their mean square, the largest
first, over scales that are fixed beforehand.

Then the loss goes down in turns. Scales become those that fit the levels best, in closed form. Then
each level becomes the best one beside all others. There are two such rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from export.calibrate.input_statistics import InputStatistics
from export.formats.formats import Format
from export.formats.packing import Quantized, blocks_of
from export.formats.round_to_nearest import best_scales

_DAMPING = 0.01  # of the mean of H's diagonal, added to it
_SMALL = 128  # triangular matrices up to this size are inverted as any other
_LAZY = 128  # inputs whose corrections to the rest of the matrix are applied together
_CHUNK_BYTES = 32 << 20  # of the matrix, rounded at once
_ROUNDS, _SWEEPS = 2, 2  # of scales and levels, and of levels in each


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What rounding needs to know about some inputs, for all matrices that multiply them.

    Attributes:
        importance: their mean squares, float32 `[in]`.
        order: in which they are rounded.
        factor: the `U` of above in that order, float32 `[in, in]`.
        square: the `H` of above, damped, float32 `[in, in]`.
    """

    importance: np.ndarray
    order: np.ndarray
    factor: np.ndarray
    square: np.ndarray


def feedbacks(
    statistics: InputStatistics, divisors: np.ndarray | None = None
) -> Iterator[Feedback]:
    """Yields one for each of the statistics' squares, on demand, because each needs as much memory.

    Args:
        statistics: of the inputs.
        divisors: by which the inputs have been divided since they were observed, `[in]`, or `None`.
    """
    for square in statistics.divided_by(divisors):
        yield feedback_of(square)


def feedback_of(square: np.ndarray) -> Feedback:
    """What rounding needs to know about inputs with these second moments, `[in, in]`."""
    importance = np.maximum(np.diag(square), 0).astype(np.float32)
    order = np.argsort(-importance, kind="stable")
    damped = square.astype(np.float32)
    diagonal = np.arange(len(order))
    mean = float(np.trace(square, dtype=np.float64)) / len(order) or 1.0
    damped[diagonal, diagonal] += np.float32(_DAMPING * mean)
    return Feedback(importance, order, _inverse_factor(damped, order), damped)


def gptq(rows: np.ndarray, feedback: Iterable[Feedback], fmt: Format) -> Quantized:
    """Round a matrix so that its outputs on a text change least.

    Args:
        rows: float32 `[outputs, inputs]`.
        feedback: of its inputs, one part of them after the other; errors stay within a part.
        fmt: a quantized one, whose blocks do not cross the parts' edges.
    """
    spans = []
    first = 0
    for part in feedback:
        last = first + len(part.order)
        spans.append(_round_span(rows[:, first:last], part, fmt))
        first = last
    return _joined(spans, axis=1)


def _joined(parts: Sequence[Quantized], axis: int) -> Quantized:
    """Matrices side by side: along their rows, 0, or their blocks, 1."""
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return Quantized(
        np.concatenate([part.levels for part in parts], axis=axis),
        np.concatenate([part.scales for part in parts], axis=axis),
        np.concatenate(zeros, axis=axis) if zeros else None,
    )


def _round_span(rows: np.ndarray, feedback: Feedback, fmt: Format) -> Quantized:
    # Outputs are independent; processing this many at a time limits the memory.
    step = max(1, _CHUNK_BYTES // (4 * rows.shape[1]))
    parts = (rows[first : first + step] for first in range(0, len(rows), step))
    chunks = [_refined(part, _round_rows(part, feedback, fmt), feedback, fmt) for part in parts]
    return _joined(chunks, axis=0)


def _round_rows(rows: np.ndarray, feedback: Feedback, fmt: Format) -> Quantized:
    importance, order, factor = feedback.importance, feedback.order, feedback.factor
    num_rows, num_inputs = rows.shape
    blocks = blocks_of(rows, fmt.block_size)
    weight = blocks_of(importance[None] + importance.mean() * 1e-3, fmt.block_size)[0]
    scales, zeros = best_scales(blocks, weight, fmt)

    work = np.ascontiguousarray(rows.T[order])  # (inputs, outputs), each input contiguous
    levels = np.zeros((blocks.shape[1] * fmt.block_size, num_rows), np.uint8)
    levels[num_inputs:] = fmt.middle  # padding, unless zero points say otherwise
    if zeros is not None:
        padding = np.arange(num_inputs, len(levels)) // fmt.block_size
        levels[num_inputs:] = zeros.T[padding]
    scale_of = np.ascontiguousarray(scales.T)[order // fmt.block_size]  # (inputs, outputs)
    usable = np.abs(scale_of) > 1e-37
    inverse = np.divide(1, scale_of, out=np.zeros_like(scale_of), where=usable)
    if zeros is None:
        zero_of = np.broadcast_to(np.float32(fmt.middle), scale_of.shape)
    else:
        zero_of = np.ascontiguousarray(zeros.T)[order // fmt.block_size].astype(np.float32)
    lowest, highest = _lowest(fmt), _highest(fmt)

    for first in range(0, num_inputs, _LAZY):
        last = min(first + _LAZY, num_inputs)
        errors = np.empty((last - first, num_rows), np.float32)
        for j in range(first, last):
            level = np.rint(work[j] * inverse[j])
            level += zero_of[j]
            np.clip(level, lowest, highest, out=level)
            levels[order[j]] = level
            level -= zero_of[j]
            level *= scale_of[j]
            error = work[j] - level
            error /= factor[j, j]
            errors[j - first] = error
            if j + 1 < last:
                work[j + 1 : last] -= factor[j, j + 1 : last, None] * error
        if last < num_inputs:
            work[last:] -= factor[first:last, last:].T @ errors
    shaped = levels.T.reshape(num_rows, -1, fmt.block_size)
    return Quantized(np.ascontiguousarray(shaped), scales, zeros)


def _refined(rows: np.ndarray, start: Quantized, feedback: Feedback, fmt: Format) -> Quantized:
    """The same matrix with a smaller loss."""
    num_rows, num_inputs = rows.shape
    block = np.arange(num_inputs) // fmt.block_size
    levels = np.ascontiguousarray(start.levels.reshape(num_rows, -1).T)  # (inputs, outputs)
    if start.zero_points is None:
        zeros = np.full(start.scales.T.shape, fmt.middle, np.float32)
    else:
        zeros = start.zero_points.T.astype(np.float32)
    signed = levels[:num_inputs] - zeros[block]
    lowest = _lowest(fmt) - zeros
    limits = lowest, lowest + (_highest(fmt) - _lowest(fmt))
    target = feedback.square @ rows.T
    scales = start.scales
    for _ in range(_ROUNDS):
        fitted = _fitted_scales(signed, target, feedback.square, fmt.block_size)
        scales = np.where(np.isfinite(fitted), fitted, scales)
        for _ in range(_SWEEPS):
            _descend(signed, scales.T, limits, block, target, feedback.square)
    levels[:num_inputs] = signed + zeros[block]  # padding stays
    shaped = levels.T.reshape(start.levels.shape)
    return Quantized(np.ascontiguousarray(shaped), scales, start.zero_points)


def _lowest(fmt: Format) -> int:
    return 1 if fmt.bits == 8 and fmt.symmetric else 0


def _highest(fmt: Format) -> int:
    return (1 << fmt.bits) - 1


def _fitted_scales(
    signed: np.ndarray, target: np.ndarray, square: np.ndarray, block_size: int
) -> np.ndarray:
    """The scales of least loss for given levels.

    Args:
        signed: levels less their zero points, float32 `[in, out]`.
        target: `square` times the matrix, `[in, out]`.
        square: `[in, in]`.
        block_size: inputs that share a scale.

    Returns:
        float32 `[out, blocks]`; 0 of blocks of zeros.
    """
    edges = np.arange(0, len(signed), block_size)
    products = np.empty((signed.shape[1], len(edges), len(edges)))
    wanted = np.add.reduceat(signed * target, edges).T.astype(np.float64)
    for number, first in enumerate(edges):
        part = slice(first, first + block_size)
        seen = square[:, part] @ signed[part]
        seen *= signed
        products[:, number] = np.add.reduceat(seen, edges).T
    diagonal = np.arange(len(edges))
    of_zeros = products[:, diagonal, diagonal] <= 0
    products[:, diagonal, diagonal] *= 1 + 1e-7
    products[:, diagonal, diagonal] += of_zeros
    return np.linalg.solve(products, wanted[..., None])[..., 0].astype(np.float32)


def _descend(
    signed: np.ndarray,
    scales: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray],
    block: np.ndarray,
    target: np.ndarray,
    square: np.ndarray,
) -> None:
    """Set each level in turn, in place, to the best one beside all others.

    Args:
        signed: levels less their zero points, float32 `[in, out]`.
        scales: float32 `[blocks, out]`.
        limits: the least and the greatest of `signed`, float32 `[blocks, out]` each.
        block: of each input, int `[in]`.
        target: as of `_fitted_scales`.
        square: as of `_fitted_scales`.
    """
    usable = np.abs(scales) > 1e-37
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=usable)
    values = signed * scales[block]
    for first in range(0, len(signed), _LAZY):
        last = min(first + _LAZY, len(signed))
        missing = target[first:last] - square[first:last] @ values  # a gradient of the loss
        for j in range(first, last):
            b = block[j]
            best = (values[j] + missing[j - first] / square[j, j]) * inverse[b]
            np.clip(np.rint(best), limits[0][b], limits[1][b], out=signed[j])
            change = signed[j] * scales[b] - values[j]
            values[j] += change
            missing -= square[first:last, j, None] * change


def _inverse_factor(damped: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The upper triangular `U` with `H⁻¹ = Uᵀ U`, float32, of a damped `H`, inputs in order."""
    hessian = damped[np.ix_(order, order)].astype(np.float64)
    # H = L Lᵀ read backwards gives H = M Mᵀ with M upper, and U = M⁻¹ up to order
    lower = np.linalg.cholesky(hessian[::-1, ::-1])
    del hessian  # of wide matrices it is a good part of the memory
    upper = lower[::-1, ::-1]  # H = upper upperᵀ
    return _inverse_of_upper(upper).astype(np.float32)  # U, since H⁻¹ = Uᵀ U


def _inverse_of_upper(matrix: np.ndarray) -> np.ndarray:
    """Of an upper triangular matrix, by halves: a sixth of the work of a general inverse."""
    size = len(matrix)
    if size <= _SMALL:
        return np.triu(np.linalg.inv(matrix))
    half = size // 2
    inverse = np.zeros_like(matrix)
    first, last = slice(half), slice(half, None)
    inverse[first, first] = _inverse_of_upper(matrix[first, first])
    inverse[last, last] = _inverse_of_upper(matrix[last, last])
    inverse[first, last] = -(inverse[first, first] @ (matrix[first, last] @ inverse[last, last]))
    return inverse
