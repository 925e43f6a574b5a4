"""Whether two processors agree on a bundle, and by how much they differ.

Processors round differently, so the greatest difference of their logits on the same text, the
noise, is measured first. Where one is sure of its greedy choice by more than twice that, since each
of two logits may move, the other has to choose the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from edge_demo.evaluate.perplexity import kl_divergence
from tools.arm64.observe import Observation


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What `compare` found, of a processor against the one here.

    Attributes:
        noise: the greatest difference of a logit on the text.
        kl: mean divergence of the next-token distributions over the text, in nats, from here to
            there.
        same_top_token: share of the text's positions where both find the same token most likely.
        same: greedy tokens that are the same, up to the first difference in each answer.
        tokens: greedy tokens in all.
        partings: for each answer that differs, `(answer, token, margin)`: where it does first and
            how sure the processor here was of its choice.
    """

    noise: float
    kl: float
    same_top_token: float
    same: int
    tokens: int
    partings: tuple[tuple[int, int, float], ...]

    @property
    def clear_partings(self) -> list[tuple[int, int, float]]:
        """Those that rounding does not explain."""
        return [parting for parting in self.partings if parting[2] > 2 * self.noise]


def compare(here: Observation, there: Observation) -> Agreement:
    """Compare two observations of one bundle, made with the same arguments."""
    if here.logits.shape != there.logits.shape or len(here.answers) != len(there.answers):
        raise ValueError("the observations were not made with the same arguments")
    partings: list[tuple[int, int, float]] = []
    same = 0
    for number, (ours, theirs) in enumerate(zip(here.answers, there.answers, strict=True)):
        index = first_difference(ours, theirs)
        same += len(ours) if index is None else index
        if index is not None:
            partings.append((number, index, here.margins[number][index]))
    return Agreement(
        noise=float(np.abs(here.logits - there.logits).max()),
        kl=mean_kl(here, there),
        same_top_token=float((here.logits.argmax(axis=-1) == there.logits.argmax(axis=-1)).mean()),
        same=same,
        tokens=sum(map(len, here.answers)),
        partings=tuple(partings),
    )


def mean_kl(reference: Observation, other: Observation) -> float:
    """Mean divergence of the next-token distributions over the text, in nats."""
    return float(kl_divergence(reference.logits, other.logits).mean())


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two answers differ first; `None` if they are the same."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
