"""Stores weights that are already quantized in the source without rounding them again.

A storage format can hold a source's grid under two conditions. Each of its blocks is inside one
block of the source, and the shifted levels fit its range. Every block is checked: it counts as kept
only if its dequantized values equal the source's.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from export.formats.formats import BITS, BLOCK_SIZES, Format
from export.formats.packing import Quantized, zero_points_in_planes
from export.formats.round_to_nearest import round_to_nearest
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.quantized_grid import GridSource, QuantizedGrid
from gemma_keras.config import GemmaConfig

MOST_BITS_KEPT = 4
TABLES = ("token_embedding", "head")
_CHUNK_BYTES = 8 << 20  # rows whose float values fit a cache
_BLOCK_OF_A_ROW = (
    32  # if a whole row has one scale, any block size works; this one suits the activations
)


def keep(grid: QuantizedGrid, fmt: Format) -> Quantized | None:
    """Returns the same values in a storage format, or `None` if it cannot store them all exactly.

    Args:
        grid: of the source.
        fmt: a quantized one.
    """
    if _block_of(grid, fmt) is None:
        return None
    first = next(_chunks(grid), None)  # a grid that does not fit shows it early
    if first is not None and not _keep_blocks(grid.rows(first), fmt)[1].all():
        return None
    kept, again = keep_or_round(grid, fmt)
    return kept if again == 0 else None


def keep_or_round(grid: QuantizedGrid, fmt: Format) -> tuple[Quantized, float]:
    """Converts a grid to a storage format; also returns the share of its blocks that had to be
    rounded again.

    Blocks that the format stores exactly are kept; the others are rounded to nearest. In two
    planes, blocks of few levels are multiplied by a power of two, and some are negated together
    with their scale. Then the high plane is as accurate as possible.

    Args:
        grid: of the source.
        fmt: a quantized one.
    """
    num_rows, num_blocks = len(grid.levels), fmt.num_blocks(grid.num_inputs)
    levels = np.empty((num_rows, num_blocks, fmt.block_size), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.float32)
    zeros = None if fmt.symmetric else np.empty((num_rows, num_blocks), np.uint8)
    num_again = 0
    for chunk in _chunks(grid):
        some = grid.rows(chunk)
        quantized, exact = _keep_blocks(some, fmt)
        if not exact.all():
            rounded = round_to_nearest(some.values(), fmt)
            quantized = _choose(exact, quantized, rounded)
            num_again += int((~exact).sum())
        levels[chunk], scales[chunk] = quantized.levels, quantized.scales
        if zeros is not None and quantized.zero_points is not None:
            zeros[chunk] = quantized.zero_points
    return Quantized(levels, scales, zeros), num_again / max(1, scales.size)


def best_format(grid: QuantizedGrid, most_bits: int = 8) -> Format | None:
    """Returns the smallest low-bit format that stores a grid exactly, or `None`.

    Its blocks are the source's, or the largest that onnxruntime takes and that divide the source's.

    Args:
        grid: of the source.
        most_bits: formats of more bits are not tried.
    """
    block_size = _block_size(grid)
    if block_size is None:
        return None
    for bits in BITS:
        if grid.bits <= bits <= most_bits:
            for symmetric in (True, False):
                fmt = Format(bits, block_size, symmetric)
                if keep(grid, fmt) is not None:
                    return fmt
    return None


def _block_size(grid: QuantizedGrid) -> int | None:
    if grid.block_size >= grid.num_inputs:
        return _BLOCK_OF_A_ROW
    return max((size for size in BLOCK_SIZES if grid.block_size % size == 0), default=None)


def _block_of(grid: QuantizedGrid, fmt: Format) -> np.ndarray | None:
    """Returns, for each block of the format, the source's block that contains it: int `[blocks]`;
    `None` if one overlaps two."""
    first = np.arange(fmt.num_blocks(grid.num_inputs)) * fmt.block_size
    last = np.minimum(first + fmt.block_size, grid.num_inputs) - 1
    owner = first // grid.block_size
    return owner if (owner == last // grid.block_size).all() else None


def _chunks(grid: QuantizedGrid) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (4 * max(1, grid.num_inputs)))
    for first in range(0, len(grid.levels), step):
        yield slice(first, first + step)


def _keep_blocks(grid: QuantizedGrid, fmt: Format) -> tuple[Quantized, np.ndarray]:
    """A grid in a format's blocks, and which of them are exact: bool `[rows, blocks]`."""
    owner = _block_of(grid, fmt)
    if owner is None:  # blocks of several scales: nothing is kept
        shape = len(grid.levels), fmt.num_blocks(grid.num_inputs)
        nothing = Quantized(
            np.zeros((*shape, fmt.block_size), np.uint8),
            np.zeros(shape, np.float32),
            None if fmt.symmetric else np.zeros(shape, np.uint8),
        )
        return nothing, np.zeros(shape, bool)
    scales = grid.scales[:, owner]
    zeros = grid.zero_points[:, owner].astype(np.int32)
    if grid.offsets is not None:
        # An offset that is a multiple of the scale is a zero point.
        usable = scales != 0
        with np.errstate(over="ignore"):
            steps = np.divide(-grid.offsets[:, owner], scales, out=scales * 0, where=usable)
        zeros += np.rint(np.clip(steps, -1024, 1024)).astype(np.int32)

    num_blocks = len(owner)
    padding = num_blocks * fmt.block_size - grid.num_inputs
    real = np.pad(np.ones(grid.num_inputs, bool), (0, padding))
    levels = np.pad(grid.levels, ((0, 0), (0, padding))).astype(np.int16)
    signed = levels.reshape(-1, num_blocks, fmt.block_size) - zeros[..., None].astype(np.int16)
    signed[:, ~real.reshape(num_blocks, fmt.block_size)] = 0  # padding has no value
    least, greatest = signed.min(axis=-1), signed.max(axis=-1)

    top = (1 << fmt.bits) - 1
    stored_zeros = None
    if fmt.symmetric or fmt.planes == 2:
        factors = _factors(least, greatest, fmt)
        signed *= factors[..., None]
        scales = scales / factors.astype(np.float32)
        zero = np.int16(fmt.middle)
        if fmt.planes == 2:
            stored_zeros = zero_points_in_planes(signed.max(axis=-1))
            zero = stored_zeros[..., None].astype(np.int16)
        stored = signed + zero
    else:
        lowest, highest = np.maximum(0, -least), np.minimum(top, top - greatest)
        moved = np.clip(np.clip(zeros, lowest, highest), 0, top)
        stored = signed + moved[..., None].astype(np.int16)
        stored_zeros = moved.astype(np.uint8)
    quantized = Quantized(np.clip(stored, 0, top).astype(np.uint8), scales, stored_zeros)
    same = quantized.values(fmt, grid.num_inputs) == grid.values()
    same = np.pad(same, ((0, 0), (0, padding)), constant_values=True)
    same = same.reshape(-1, num_blocks, fmt.block_size)
    return quantized, np.logical_and.reduce(same, axis=-1)


def _factors(least: np.ndarray, greatest: np.ndarray, fmt: Format) -> np.ndarray:
    """Returns the factor of each block's levels that makes them fit around the middle, int16: 1 or
    -1, and in two planes powers of two. Blocks that no factor fits get 1."""
    chosen = np.ones(least.shape, np.int16)
    found = np.zeros(least.shape, bool)
    for size in (16, 8, 4, 2, 1) if fmt.planes == 2 else (1,):
        upper, lower = greatest.astype(np.int32) * size, -least.astype(np.int32) * size
        fits = (upper < fmt.middle) & (lower <= fmt.middle)
        turned = ~fits & (lower < fmt.middle) & (upper <= fmt.middle)
        if fmt.planes == 2:  # as `round_to_nearest` does
            turned |= (upper > 119) & (upper <= fmt.middle) & (lower < upper)
        fits = (fits | turned) & ~found
        chosen[fits] = np.where(turned, -size, size)[fits]
        found |= fits
    return chosen


def _choose(exact: np.ndarray, kept: Quantized, rounded: Quantized) -> Quantized:
    zeros = None
    if kept.zero_points is not None and rounded.zero_points is not None:
        zeros = np.where(exact, kept.zero_points, rounded.zero_points)
    return Quantized(
        np.where(exact[..., None], kept.levels, rounded.levels),
        np.where(exact, kept.scales, rounded.scales),
        zeros,
    )


# --- a model's weights -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KeptWeights:
    """The weights that are stored as in the source, without balancing or rounding.

    Attributes:
        source: the weights themselves, not balanced ones.
        formats: name to the format that holds it exactly, for the matrices that are kept.
        sentence: says which matrices are kept and which are rounded again; empty if the source has
            only floats.
        tables_rounded_again: a table's name to the share of its blocks that had to be rounded
            again; filled in when `rounded` has read it.
    """

    source: Mapping[str, np.ndarray]
    formats: Mapping[str, Format]
    sentence: str
    tables_rounded_again: dict[str, float] = dataclasses.field(default_factory=dict)

    def matrix(self, name: str, fmt: Format) -> Quantized | None:
        """A kept matrix; `None` for all else, which goes through memory in chunks."""
        return self.rounded(name, fmt) if name in self.formats else None

    def rounded(self, name: str, fmt: Format) -> Quantized | None:
        """A kept matrix, or a table as nearly as its format can hold it; `None` for all others.

        Made for `export.graph.store_weights.store_weights`, which reads one weight at a time.
        """
        is_table = name in TABLES and fmt.quantized
        if not isinstance(self.source, GridSource):
            return None
        if not is_table and self.formats.get(name) != fmt:
            return None
        grid = self.source.grid(name)
        if grid is None or _block_of(grid, fmt) is None:
            return None
        quantized, again = keep_or_round(grid, fmt)
        if is_table:
            self.tables_rounded_again[name] = again
        return quantized


def kept_weights(
    config: GemmaConfig, weights: Mapping[str, np.ndarray], most_bits: int = MOST_BITS_KEPT
) -> KeptWeights:
    """Finds the matrices whose grid a low-bit format stores exactly.

    For the int4 recipe: to round 4 bits again costs a mean KL of 0.05. Not for int8, where
    balancing the activations, which changes every matrix, gains more (0.0024 to 0.0010) than
    exact weights would (0.0005).

    Args:
        config: the model's.
        weights: as a checkpoint gives them.
        most_bits: of a format that matrices are kept in; 0 keeps none of them.

    Raises:
        CheckpointError: the source holds numbers that are not finite.
    """
    formats: dict[str, Format] = {}
    kept: Counter[str] = Counter()
    again: Counter[str] = Counter()
    if isinstance(weights, GridSource):
        for spec in weight_specs(config).values():
            kind = weights.stored_as(spec.name)
            if spec.kind != "matrix" or kind is None:
                continue
            fmt = None
            if most_bits and (grid := weights.grid(spec.name)) is not None:
                fmt = best_format(grid, most_bits)
            if fmt is None:
                again[kind] += 1
            else:
                formats[spec.name] = fmt
                kept[kind] += 1
    return KeptWeights(weights, formats, _sentence(kept, again))


def _sentence(kept: Counter[str], again: Counter[str]) -> str:
    parts = []
    for kinds, verb in ((kept, "stored unchanged"), (again, "rounded again")):
        if kinds:
            counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
            matrices, are = ("matrix", "is") if kinds.total() == 1 else ("matrices", "are")
            parts.append(f"{counts} {matrices} of the source {are} {verb}")
    return "; ".join(parts)
