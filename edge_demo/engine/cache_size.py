"""Computes the size of the key-value buffers that `KVCache` allocates."""

from __future__ import annotations

from edge_demo.bundle.manifest import GraphSpec, RopeSpec, WindowSpec
from edge_demo.errors import BundleError

STEP = 256
# Places beyond a window: its tokens are moved to the front, by one place more than these. That is a
# multiple of `prompt_chunks.UNIT`, so that sums over keys are split in the same way at any
# position.
SLACK = 255


def capacity_for(tokens: int, limit: int) -> int:
    """Places of a buffer that grows, made for `tokens` and for at most `limit` tokens."""
    return min(limit, -(-tokens // STEP) * STEP)


def cache_bytes(
    graph: GraphSpec,
    ropes: tuple[RopeSpec, ...],
    windows: tuple[WindowSpec, ...],
    limit: int,
    tokens: int,
) -> int:
    """Bytes of keys, values and rotary tables, of buffers made for `tokens` at once.

    Raises:
        BundleError: the graph has a dimension with an unknown name.
    """
    capacity = capacity_for(tokens, limit)
    sizes = {w.name: w.length + SLACK for w in windows} | {"batch": 1, "capacity": capacity}
    total = sum(8 * rope.dims * capacity for rope in ropes)
    for spec in graph.inputs:
        if spec.name.startswith("past_key_values."):
            count = 1 if spec.dtype == "int8" else 4
            for size in spec.shape:
                if isinstance(size, str) and size not in sizes:
                    raise BundleError(
                        f"{graph.file} has a {spec.name!r} whose size is unknown; export the "
                        "bundle again"
                    )
                count *= size if isinstance(size, int) else sizes[size]
            total += count
    return total
