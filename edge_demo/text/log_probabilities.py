"""Log-probabilities of a token and of its likeliest alternatives."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenLogProb:
    """How likely a token was, and which were likeliest.

    Attributes:
        id: of the token that was chosen.
        logprob: natural logarithm of its probability, before temperature and other settings.
        top: the likeliest tokens and theirs, likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probability(logits: np.ndarray, token: int, count: int) -> TokenLogProb:
    """The log-probability of one token, and those of its likeliest alternatives.

    Args:
        logits: float32 `(vocabulary_size,)`.
        token: that was chosen.
        count: of the alternatives, which may be 0.
    """
    highest = logits.max()
    total = float(highest) + float(np.log(np.exp((logits - highest).astype(np.float64)).sum()))
    likeliest: np.ndarray = np.zeros(0, np.int64)
    if count:
        likeliest = np.argpartition(logits, logits.size - count)[logits.size - count :]
        likeliest = likeliest[np.lexsort((likeliest, -logits[likeliest]))]
    top = tuple((int(i), float(logits[i]) - total) for i in likeliest)
    return TokenLogProb(token, float(logits[token]) - total, top)
