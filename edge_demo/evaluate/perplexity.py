"""Computes the perplexity of a text in windows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edge_demo.engine.runner import Engine
from edge_demo.errors import NotFiniteError, RequestError


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        nll: mean negative log-likelihood of a token, in nats.
        tokens: how many tokens were predicted.
        windows: how many windows they stood in.
    """

    nll: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """`exp(nll)`; infinity beyond what a float holds."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


def windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Split a text into overlapping windows; in each window only tokens that were not predicted
    before count.

    Args:
        num_tokens: of the text, without a beginning-of-sequence token.
        length: tokens in a window, of which the first is the beginning-of-sequence token.
        stride: tokens from one window's start to the next; at most `length - 1`.

    Yields:
        `(first, end, count)`: the window holds tokens `first` to `end - 1` of the text, and its
        last `count` are predicted.
    """
    room = length - 1
    if room < 1 or not 1 <= stride <= room:
        raise RequestError(
            "the window must have at least 2 tokens, and the stride must be 1 to "
            f"{max(1, room)}; found {length} and {stride}"
        )
    end = 0
    first = 0
    while end < num_tokens:
        new_end = min(first + room, num_tokens)
        yield first, new_end, new_end - end
        end = new_end
        first += stride


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row, from `softmax(p)` to `softmax(q)`, in nats.

    Args:
        p: logits of the reference, float32 `(rows, vocabulary_size)`.
        q: logits to judge, of the same shape.

    Returns:
        float64 `(rows,)`; rounding may take it just below 0 where the rows are equal.
    """
    result = np.empty(len(p))
    for row in range(len(p)):  # one at a time: 262 144 float64 values stay in the cache
        below_p, below_q = (x[row].astype(np.float64) - x[row].max() for x in (p, q))
        weights = np.exp(below_p)
        total = weights.sum()
        difference = weights @ (below_p - below_q) / total
        result[row] = difference - np.log(total) + np.log(np.exp(below_q).sum())
    return result


def token_log_probabilities(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Log-probability of each target under its row of logits, in nats: float64 `(rows,)`.

    Raises:
        NotFiniteError: a logit is NaN or infinity, or a target's is -infinity.
    """
    peak = logits.max(axis=-1, keepdims=True)  # NaN if there is one
    if not np.isfinite(peak).all():
        raise NotFiniteError
    # float32 sums of 262 144 terms are good to about 1e-6, so the sum is taken in float64
    log_sum = np.log(np.exp(logits - peak).sum(axis=-1, dtype=np.float64))
    picked = logits[np.arange(len(targets)), targets].astype(np.float64)
    if not np.isfinite(picked).all():
        raise NotFiniteError
    return picked - peak[:, 0] - log_sum


def score(
    engine: Engine,
    bos: int,
    ids: Sequence[int],
    length: int = 512,
    stride: int = 256,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score a text; every window begins with the beginning-of-sequence token, as Gemma expects.

    Args:
        engine: emptied and used.
        bos: the beginning-of-sequence token.
        ids: the text's tokens, at least one.
        length: tokens in a window, at most the context.
        stride: tokens from one window to the next; `length // 2` scores second halves.
        max_windows: stop after as many.
        on_window: called with (windows done, all of them).

    Raises:
        RequestError: the text is empty, or length and stride do not fit.
        NotFiniteError: as `token_log_probabilities`.
    """
    if not ids:
        raise RequestError("the text is empty; there is nothing to score")
    if length > engine.context_length:
        raise RequestError(
            f"a window of {length:,} tokens does not fit the context of {engine.context_length:,}; "
            f"give --length 2 to {engine.context_length}"
        )
    cuts = list(windows(len(ids), length, stride))[:max_windows]
    total = 0.0
    tokens = 0
    for done, (first, end, count) in enumerate(cuts):
        window = list(ids[first:end])
        engine.rewind(0)
        position = 0
        # The logits after BOS and the tokens before `i` predict token `i`.
        for logits in engine.all_logits([bos, *window[:-1]]):
            targets = window[position : position + len(logits)]
            skip = max(0, len(window) - count - position)
            if skip < len(targets):
                total += token_log_probabilities(logits[skip:], targets[skip:]).sum()
                tokens += len(targets) - skip
            position += len(logits)
        on_window(done + 1, len(cuts))
    return Score(nll=-total / tokens, tokens=tokens, windows=len(cuts))
