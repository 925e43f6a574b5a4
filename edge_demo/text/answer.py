"""One answer: its tokens as they are chosen, their text, and where it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from edge_demo.engine.candidates import Candidates, below
from edge_demo.text.grammar import Grammar
from edge_demo.text.logit_bias import LogitBias
from edge_demo.text.sampling import Sampler
from edge_demo.text.stop_texts import StopTexts
from edge_demo.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "context", "interrupted"]


class TextPiece(NamedTuple):
    """What one token adds to an answer.

    Attributes:
        text: that has become certain; it may be empty.
        id: of the token; `None` of the rest that comes after the last one.
    """

    text: str
    id: int | None


@dataclasses.dataclass
class Completion:
    """One answer, filled in as it grows.

    Attributes:
        prompt_ids: what it continues.
        ids: the tokens generated so far: without a stop token, with those of a stop text.
        text: their text, up to a stop text.
        finish_reason: a stop token or text came, `max_tokens` was reached, or the context was
            full; `interrupted` until then.
        reused_tokens: tokens of the prompt that an earlier answer had left in the engine.
        prefill_s: from the start to the first token.
        decode_s: from the first token to the last, without the time that the reader of the text
            takes.
    """

    prompt_ids: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "interrupted"
    reused_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens computed a second."""
        computed = len(self.prompt_ids) - self.reused_tokens
        return computed / self.prefill_s if self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second after the first; `None` while there is no second."""
        return (len(self.ids) - 1) / self.decode_s if self.decode_s and len(self.ids) > 1 else None


class Writer:
    """Adds one token after another to an answer, until it ends.

    Args:
        completion: to fill in.
        tokenizer: of the bundle.
        sampler: chooses each token, of those that the tokenizer has a piece for. The tokens that
            end an answer are not penalized: a long conversation would have ever longer answers.
        max_tokens: the most there may be.
        context: how many tokens the engine can hold, which need not hold the last one.
        stop: texts that end it, as `edge_demo.text.stop_texts`.
        bias: added to the logits of some tokens.
        grammar: at its beginning, which the answer keeps to.
    """

    def __init__(
        self,
        completion: Completion,
        tokenizer: Tokenizer,
        sampler: Sampler,
        max_tokens: int,
        context: int,
        stop: Sequence[str] = (),
        bias: LogitBias | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self._completion = completion
        self._bias = bias
        self._grammar = grammar
        self._sampler = sampler
        self._num_pieces = tokenizer.num_pieces
        self._max_tokens = max_tokens
        self._context = context
        self._ends = frozenset(tokenizer.spec.stop)
        self._penalized = [i for i in completion.prompt_ids if i not in self._ends]
        self._stream = tokenizer.stream()
        self._stop = StopTexts(stop)

    def add(self, logits: np.ndarray | Candidates) -> str | None:
        """Choose the next token.

        Returns:
            The text that has become certain, which may be empty; `None` where a stop token ends
            the answer. `finish_reason` is `interrupted` as long as there is more to come.

        Raises:
            NotFiniteError: as `Sampler.pick`.
            NoCandidateError: as `Grammar.filter`; the same call with the logits of all tokens goes
                on.
        """
        known = below(logits, self._num_pieces)
        if self._bias is not None:
            known = self._bias.add(known)
        if self._grammar is not None:
            known = self._grammar.filter(known)
        token = self._sampler.pick(known, self._penalized)
        if self._grammar is not None:
            self._grammar.take(token)
        if token in self._ends:
            self._completion.finish_reason = "stop"
            return None
        return self._append(token)

    def add_forced(self) -> str:
        """Add the tokens of which the grammar leaves no choice; their logits need not be computed.

        Returns:
            The text that has become certain, which may be empty.
        """
        piece = ""
        if self._grammar is None or self._completion.finish_reason != "interrupted":
            return piece
        for token in self._grammar.forced():
            if token in self._ends:
                break
            self._grammar.take(token)
            piece += self._append(token)
            if self._completion.finish_reason != "interrupted":
                break
        return piece

    def _append(self, token: int) -> str:
        out = self._completion
        out.ids.append(token)
        self._penalized.append(token)
        piece = self._stop.push(self._stream.push(token))
        out.text += piece
        if self._stop.found or (self._grammar is not None and self._grammar.ended):
            out.finish_reason = "stop"
        elif len(out.ids) >= self._max_tokens:
            out.finish_reason = "length"
        elif len(out.prompt_ids) + len(out.ids) > self._context:
            out.finish_reason = "context"
        return piece

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        rest = self._stop.push(self._stream.flush()) + self._stop.flush()
        if self._stop.found:
            self._completion.finish_reason = "stop"
        self._completion.text += rest
        return rest
