"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses

import numpy as np

from edge_demo.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The most likely next tokens, in no order.

    Attributes:
        ids: int64 `(k,)`.
        logits: float32 `(k,)`.
    """

    ids: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass
class Sampler:
    """Greedy at temperature 0, else seeded sampling after temperature, top-k and top-p, in order.

    Args:
        temperature: logits are divided by it; 0 takes the greatest logit.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        top_p: keep the smallest set of the most likely tokens whose probabilities sum to at least
            this (nucleus sampling, Holtzman et al., 2019, arXiv:1904.09751).
        seed: of the random numbers; `None` takes one from the system.

    Raises:
        RequestError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise RequestError(f"temperature must be between 0 and 100, not {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"top-k must not be negative, but is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise RequestError(f"the seed must not be negative, but is {self.seed}")
        self._random = np.random.default_rng(self.seed)

    @property
    def reach(self) -> int:
        """How many of the most likely tokens it chooses among; 0 for all."""
        return 1 if self.temperature == 0 else self.top_k

    def pick(self, logits: np.ndarray | Candidates) -> int:
        """The next token's id.

        Args:
            logits: float32 `(vocabulary_size,)`, or the candidates.
        """
        if isinstance(logits, Candidates):
            order = np.argsort(logits.ids)  # so that equal logits go by id, here as everywhere
            return int(logits.ids[order[self.pick(logits.logits[order])]])
        if self.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = self.distribution(logits)
        return int(ids[self._random.choice(len(ids), p=probabilities)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be chosen, most likely first, and their probabilities.

        Returns:
            int `(n,)` ids and float64 `(n,)` probabilities that sum to 1.
        """
        keep = min(self.top_k or logits.size, logits.size)
        least = np.partition(logits, logits.size - keep)[logits.size - keep]
        ids = np.flatnonzero(logits >= least)
        # Equal logits in order of their ids, so that a seed gives the same text everywhere.
        ids = ids[np.argsort(-logits[ids], kind="stable")[:keep]]
        below = logits[ids].astype(np.float64) - logits[ids[0]]
        with np.errstate(over="ignore"):  # a temperature near 0 takes what is below to -inf
            scaled = below / self.temperature
        weights = np.exp(scaled)
        probabilities = weights / weights.sum()
        if self.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            count = max(1, int(np.searchsorted(before, self.top_p, side="left")))
            ids, probabilities = ids[:count], probabilities[:count]
            probabilities = probabilities / probabilities.sum()
        return ids, probabilities
