"""Adds a bias to the logits of some tokens, as `logit_bias` of OpenAI's API does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_demo.engine.candidates import Candidates


class LogitBias:
    """Biases of some tokens; -100 bans a token in effect, 100 all but forces it.

    Args:
        biases: token id to what is added to its logit.
    """

    def __init__(self, biases: Mapping[int, float]) -> None:
        order = sorted(biases)
        self._ids = np.array(order, np.int64)
        self._values = np.array([biases[token] for token in order], np.float32)

    @property
    def lowered(self) -> int | None:
        """How many tokens it lowers; `None` if it raises one, which may be unlikely before."""
        return None if (self._values > 0).any() else len(self._values)

    def add(self, logits: np.ndarray | Candidates) -> np.ndarray | Candidates:
        """The logits with the biases, in an array of their own.

        Args:
            logits: float32 `(n,)` of the ids 0 to n - 1, or candidates. Biases of other tokens are
                ignored.
        """
        if isinstance(logits, np.ndarray):
            known = self._ids < logits.size
            biased = logits.copy()
            biased[self._ids[known]] += self._values[known]
            return biased
        places = np.searchsorted(self._ids, logits.ids).clip(max=self._ids.size - 1)
        added = np.where(self._ids[places] == logits.ids, self._values[places], np.float32(0))
        return Candidates(logits.ids, logits.logits + added)
