"""How much memory the bundle of an embedder takes, and what to do where there is too little."""

from __future__ import annotations

import dataclasses

from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import MemoryLimit
from edge_demo.engine import memory
from edge_demo.engine.memory import MemoryEstimate
from edge_demo.errors import TooLittleMemoryError
from edge_demo.units import megabytes

# Tokens that are run at once: texts of similar length together, a longer text by itself.
TOKENS = (512, 256, 128, 64)
_SCORES = 3  # arrays of scores at once: before the mask, after it, as weights


def estimate(bundle: Bundle, tokens: int) -> MemoryEstimate:
    """What running some tokens at once takes; most where they are one text.

    Args:
        bundle: of an embedder.
        tokens: run at once.

    Raises:
        BundleError: the graph cannot be read.
        RequestError: the bundle generates text.
    """
    heads = bundle.require_embedder().num_heads
    needed = memory.estimate(bundle, bundle.engine, tokens, tokens, logit_rows=0)
    return dataclasses.replace(needed, logits=4 * tokens * tokens * (_SCORES * heads + 1))


def fitting(bundle: Bundle) -> tuple[MemoryEstimate, MemoryLimit | None]:
    """How an embedder is run on this device: as many tokens at once as there is memory for.

    Returns:
        What it then takes, and the limit that is too small for even the fewest, if one is.

    Raises:
        BundleError, RequestError: as `estimate`.
    """
    for tokens in TOKENS:
        needed = estimate(bundle, min(tokens, bundle.context_length))
        if memory.shortage(needed) is None:
            return needed, None
    needed = estimate(bundle, min(TOKENS[-1], bundle.context_length))
    return needed, memory.shortage(needed)


def check_text(bundle: Bundle, tokens: int) -> None:
    """Refuse a text for which there is not enough memory beside an embedder that is loaded.

    Args:
        bundle: of the embedder.
        tokens: of the text.

    Raises:
        TooLittleMemoryError: there is not.
    """
    needed = dataclasses.replace(estimate(bundle, tokens), weights=0, copied_from=0)
    short = memory.shortage(needed)
    if short is not None:
        raise TooLittleMemoryError(
            f"a text of {tokens:,} tokens needs about {megabytes(getattr(needed, short.counts))} "
            f"of memory, but only {megabytes(short.free)} is available {short.bound}; shorten it, "
            "close other programs, or try it anyway with --force"
        )
