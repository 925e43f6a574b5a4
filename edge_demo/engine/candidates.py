"""Candidates: the most likely next tokens, which one graph returns instead of all logits."""

from __future__ import annotations

import dataclasses

import numpy as np

from edge_demo.errors import EdgeError


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The most likely next tokens, unordered.

    Attributes:
        ids: int64 `(k,)`.
        logits: float32 `(k,)`.
    """

    ids: np.ndarray
    logits: np.ndarray


def below(logits: np.ndarray | Candidates, count: int) -> np.ndarray | Candidates:
    """Returns the logits of the ids 0 to `count - 1`, which are the tokenizer's tokens.

    Args:
        logits: float32 `(vocabulary_size,)`, or the candidates.
        count: of the tokenizer's pieces; a table may have more rows.

    Raises:
        EdgeError: none of the candidates is among them.
    """
    if isinstance(logits, np.ndarray):
        return logits[:count]
    known = logits.ids < count
    if known.all():
        return logits
    if not known.any():
        raise EdgeError(
            f"none of the {known.size} likeliest tokens exists in the tokenizer; run the "
            "graph that returns all logits"
        )
    return Candidates(logits.ids[known], logits.logits[known])
