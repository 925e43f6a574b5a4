"""Checks that two bundles fit into memory together, before either is loaded."""

from __future__ import annotations

import dataclasses

from edge_demo.bundle.manifest import GraphSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.engine import memory
from edge_demo.errors import BundleError, TooLittleMemoryError
from edge_demo.units import megabytes

_ADDED = ("weights", "cache", "lookups", "low_plane", "logits")


def check_both_fit(
    first: Bundle, graph: GraphSpec, texts: int, second: Bundle, force: bool = False
) -> None:
    """Refuse two bundles that do not fit; each alone is checked when its engine is made.

    Args:
        first: that answers.
        graph: of it, the one that is run.
        texts: whose keys and values the first holds at once.
        second: whose graph of all logits is run beside it, for one text.
        force: whether to run what seems not to fit.

    Raises:
        TooLittleMemoryError: there is not enough memory, even with the shortest chunks.
    """
    chunk = memory.CHUNKS[-1]
    try:
        one = memory.estimate(first, graph, chunk=chunk, texts=texts)
        other = memory.estimate(second, second.engine, chunk=chunk)
    except BundleError:
        return  # onnxruntime will say what is wrong with it
    both = dataclasses.replace(
        one,
        **{name: getattr(one, name) + getattr(other, name) for name in _ADDED},
        activation=one.activation + other.activation,
        copied_from=max(one.copied_from, other.copied_from),
    )
    short = memory.shortage(both)
    if short is None or force:
        return
    raise TooLittleMemoryError(
        f"{first.name} and {second.name} together need about "
        f"{megabytes(getattr(both, short.counts))} of memory, but only "
        f"{megabytes(short.free)} is available {short.bound}; take a smaller guard, close other "
        "programs, or try it anyway with --force"
    )
