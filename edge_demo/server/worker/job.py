"""A prompt that is to be answered, and the events of its answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

from edge_demo.text.answer import Completion
from edge_demo.text.grammar import Grammar
from edge_demo.text.log_probabilities import TokenLogProb
from edge_demo.text.logit_bias import LogitBias
from edge_demo.text.sampling import Sampler


class Piece(NamedTuple):
    """What a token adds to an answer.

    Attributes:
        text: that has become certain; it may be empty.
        logprob: of the token, where it was asked for.
    """

    text: str
    logprob: TokenLogProb | None = None


class Reading(NamedTuple):
    """A part of a long prompt has been run.

    Attributes:
        done: tokens that were run or reused.
        total: of the prompt.
    """

    done: int
    total: int


class Ended(NamedTuple):
    """There comes no more of the answer.

    Attributes:
        cut: why it ends before its end, as the finish reason of a choice; `None` if it is whole.
    """

    cut: str | None = None


class Failed(NamedTuple):
    """There is no answer, or no more of it.

    Attributes:
        error: why.
    """

    error: Exception


Event = Piece | Reading | Ended | Failed
_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt and how it is answered.

    Attributes:
        ids: of the prompt.
        sampler: chooses each token.
        max_tokens: the most of the answer.
        tell: called with each event, by the worker's thread.
        stop: texts that end the answer.
        bias: of logits.
        grammar: at its beginning, which the answer keeps to.
        top: number of likely alternatives given for each token; `None` for no log-probabilities.
        namespace: keys and values are shared only within one.
        shared: how many of the first tokens other prompts may begin with too.
        next_beginning: makes of the answer's text the tokens that the next prompt will begin with,
            to be run while there is nothing else to do.
        cancelled: whether nobody waits for it any more; anyone may set it.
        completion: what has come so far.
    """

    ids: list[int]
    sampler: Sampler
    max_tokens: int
    tell: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    bias: LogitBias | None = None
    grammar: Grammar | None = None
    top: int | None = None
    namespace: str = ""
    shared: int = 0
    next_beginning: Callable[[str], list[int]] | None = None
    cancelled: bool = False
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        self.completion = Completion(self.ids)
