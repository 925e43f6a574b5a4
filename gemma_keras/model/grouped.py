"""Floats of what Keras holds in integers with a scale and a zero point for each block."""

from __future__ import annotations

from keras import ops


def values(levels, scale, zero, groups, axis: int):
    """`(level - zero) * scale`, of the block that each place along an axis belongs to.

    Args:
        levels: float, of two axes.
        scale: `levels`'s shape, with blocks along `axis`.
        zero: as `scale`.
        groups: of each place along `axis`, a number `(places,)`.
        axis: 0 or 1.

    Returns:
        As `levels`.
    """
    groups = ops.cast(groups, "int32")
    zero, scale = (ops.take(ops.cast(a, levels.dtype), groups, axis=axis) for a in (zero, scale))
    return (levels - zero) * scale
