"""Applies repetition penalties: lowers the logits of tokens that already occur in the text.

`repeat_penalty` r divides a positive logit by r and multiplies a negative one by r. It applies
once, however often the token occurs (Keskar et al., 2019, arXiv:1909.05858). The sign is as in
transformers' `RepetitionPenaltyLogitsProcessor` and llama.cpp's `llama_sampler_penalties_apply`.
Then `frequency_penalty` f and `presence_penalty` p subtract `count * f + p`, where `count` is the
number of occurrences (OpenAI's API reference; llama.cpp the same).

The window is also llama.cpp's: the last n tokens of prompt and answer together. transformers uses
all tokens, which is -1 here. OpenAI's and vLLM's presence and frequency penalties exclude the
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def penalize(
    logits: np.ndarray,
    ids: np.ndarray | None,
    text: Sequence[int],
    repeat: float,
    presence: float,
    frequency: float,
) -> np.ndarray:
    """The logits after the penalties, in an array of their own.

    Args:
        logits: float32 `(n,)`, of the ids 0 to n - 1.
        ids: int64 `(n,)` where they are of other ids, in ascending order.
        text: the tokens to penalize; those without a logit are ignored.
        repeat: above 0; 1 for none.
        presence: 0 for none.
        frequency: 0 for none.
    """
    seen, counts = np.unique(np.asarray(text, np.int64), return_counts=True)
    if ids is None:
        places, known = seen, seen < logits.size
    else:
        places = np.searchsorted(ids, seen).clip(max=ids.size - 1)
        known = ids[places] == seen
    places, counts = places[known], counts[known]
    before = logits[places].astype(np.float64)
    after = np.where(before > 0, before / repeat, before * repeat)
    result = logits.copy()
    result[places] = after - (counts * frequency + presence)
    return result
