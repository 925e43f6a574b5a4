"""Chooses the next token from logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edge_demo.engine.candidates import Candidates
from edge_demo.errors import NotFiniteError, RequestError, brief
from edge_demo.text.penalties import penalize
from edge_demo.text.ranges import RANGES, range_text


@dataclasses.dataclass
class Sampler:
    """Greedy at temperature 0, else seeded sampling.

    In this order: penalties, temperature, top-k, top-p, min-p, which is transformers' order.

    Args:
        temperature: logits are divided by it; 0 means greedy decoding.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        top_p: keep the smallest set of the most likely tokens whose probabilities sum to at least
            this (nucleus sampling, Holtzman et al., 2019, arXiv:1904.09751).
        seed: of the random numbers; `None` takes one from the system.
        min_p: keep tokens at least this times as probable as the likeliest (Nguyen et al., 2024,
            arXiv:2407.01082); 0 keeps all.
        repeat_penalty: see `edge_demo.text.penalties`, as for the other penalties; 1 means no
            penalty.
        presence_penalty: 0 means no penalty.
        frequency_penalty: 0 means no penalty.
        repeat_last_n: how many of the text's last tokens are penalized, the prompt's among them;
            0 for none, -1 for all.

    Raises:
        RequestError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64

    def __post_init__(self) -> None:
        for name, (least, most, inclusive) in RANGES.items():
            value = getattr(self, name)
            if not (least <= value <= most and (inclusive or value != least)):
                raise RequestError(
                    f"{_spoken(name)} must be {range_text(name)}, not {brief(value)}"
                )
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise RequestError(f"{_spoken(name)} must not be negative, but is {brief(value)}")
        if self.repeat_last_n < -1:
            raise RequestError(
                f"repeat-last-n must be a number of tokens, or -1 for all, not "
                f"{brief(self.repeat_last_n)}"
            )
        self._random = np.random.default_rng(self.seed)

    @property
    def effective_top_k(self) -> int:
        """Effective top-k: how many of the most likely tokens it chooses among; 0 for all.

        If penalties only lower the logits of at most n tokens, the k likeliest tokens afterwards
        are among the k + n likeliest before.
        """
        reach = 1 if self.temperature == 0 else self.top_k
        if not reach or not self._penalizes:
            return reach
        raises = self.repeat_penalty < 1 or min(self.presence_penalty, self.frequency_penalty) < 0
        return 0 if raises or self.repeat_last_n < 0 else reach + self.repeat_last_n

    @property
    def _penalizes(self) -> bool:
        penalties = (self.repeat_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return self.repeat_last_n != 0 and any(penalties)

    def pick(self, logits: np.ndarray | Candidates, text: Sequence[int] = ()) -> int:
        """The next token's id.

        Args:
            logits: float32 `(vocabulary_size,)`, or the candidates.
            text: the tokens so far that penalties count.

        Raises:
            NotFiniteError: a logit is NaN or infinity. A token with -infinity is never chosen,
                unless all logits are -infinity.
        """
        ids = None
        if isinstance(logits, Candidates):
            order = np.argsort(logits.ids)  # so that equal logits go by id, here as everywhere
            ids, logits = logits.ids[order], logits.logits[order]
        if self._penalizes:
            last = text if self.repeat_last_n < 0 else text[-self.repeat_last_n :]
            penalties = self.repeat_penalty, self.presence_penalty, self.frequency_penalty
            logits = penalize(logits, ids, last, *penalties)
        chosen = self._choose(logits)
        return chosen if ids is None else int(ids[chosen])

    def _choose(self, logits: np.ndarray) -> int:
        best = int(logits.argmax())  # NaN counts as the greatest
        if not np.isfinite(logits[best]):
            raise NotFiniteError
        if self.temperature == 0:
            return best
        ids, probabilities = self.distribution(logits)
        return int(ids[self._random.choice(len(ids), p=probabilities)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be chosen, most likely first, and their probabilities.

        Args:
            logits: float32 `(n,)`, finite, penalized if they are to be.

        Returns:
            int `(m,)` ids and float64 `(m,)` probabilities that sum to 1.
        """
        keep = min(self.top_k or logits.size, logits.size)
        least = np.partition(logits, logits.size - keep)[logits.size - keep]
        ids = np.flatnonzero(logits >= least)
        # Equal logits in order of their ids, so that a seed gives the same text everywhere.
        ids = ids[np.argsort(-logits[ids], kind="stable")[:keep]]
        below_first = logits[ids].astype(np.float64) - logits[ids[0]]
        with np.errstate(over="ignore"):  # a temperature near 0 turns lower logits into -inf
            scaled = below_first / self.temperature
        weights = np.exp(scaled)
        probabilities = weights / weights.sum()
        count = len(ids)
        if self.top_p < 1:
            before = np.cumsum(probabilities) - probabilities
            count = max(1, int(np.searchsorted(before, self.top_p, side="left")))
        if self.min_p:
            count = min(count, int(np.count_nonzero(weights >= self.min_p)))  # the first's is 1
        if count < len(ids):
            ids, probabilities = ids[:count], probabilities[:count]
            probabilities = probabilities / probabilities.sum()
        return ids, probabilities


def _spoken(name: str) -> str:
    return {"seed": "the seed"}.get(name, name.replace("_", "-"))
