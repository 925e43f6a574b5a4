"""Speculative decoding: guesses tokens, verifies them in one step, and keeps the matching ones.

A model reads all its weights to run one token or several. So correctly guessed tokens cost almost
no time (Leviathan et al., 2022, arXiv:2211.17192). Here a guess is a single token, not a
distribution. The sampler chooses every token from the model's own logits, with the same random
numbers as in plain decoding. The result is the same if several rows round like one. With 8-bit
activations this is not always so: if two tokens are almost equally likely, the other one may be
chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.candidates import Candidates, below
from edge_demo.engine.runner import CandidateEngine, Engine, common_prefix
from edge_demo.errors import NotFiniteError, RequestError
from edge_demo.text.sampling import Sampler

_NGRAMS = (4, 3, 2)
_FEWEST, _MOST = 2, 8
_PAUSE = 8
_LONGEST_PAUSE = 128


class Drafter(Protocol):
    """The interface of a drafter, which guesses the next tokens."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Returns at most `most` tokens that may follow; none if it has no guess."""
        ...


class PromptLookup:
    """Guesses that a text continues as it did after the last occurrence of the same tokens.

    The n-grams of prompt and answer are the draft model: good where an answer repeats its prompt,
    as in summaries, edits of code, or quotations (prompt lookup decoding, Saxena, 2023).
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """As `Drafter`; `tokens` are all those so far, from the first on."""
        known = len(self._tokens)
        if list(tokens[:known]) != self._tokens:
            known = 0
            self._after.clear()
        # The token after position `end` is not known yet.
        for end in range(max(1, known), len(tokens)):
            for n in _NGRAMS:
                if n <= end:
                    self._after[tuple(tokens[end - n : end])] = end
        self._tokens = list(tokens)
        for n in _NGRAMS:
            position = self._after.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if position is not None:
                return list(tokens[position : position + most])
        return []


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, by greedy decoding.

    Args:
        engine: of the smaller model; it follows the text, and nothing else may use it.
        num_pieces: of the tokenizer; `None` where every id has one.
    """

    def __init__(self, engine: Engine | CandidateEngine, num_pieces: int | None = None) -> None:
        self._engine = engine
        self._num_pieces = engine.bundle.vocabulary_size if num_pieces is None else num_pieces
        self._greedy = Sampler()

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """As `Drafter`; none where the text does not fit its context.

        Raises:
            NotFiniteError: its logits are not finite.
        """
        most = min(most, self._engine.context_length - len(tokens))
        if most < 1:
            return []
        shared = common_prefix(self._engine.tokens, tokens)
        shared = self._engine.reusable(min(shared, len(tokens) - 1))
        self._engine.rewind(shared)
        new = tokens[shared:]
        last = self._engine.extend(new)[-1] if len(new) <= _MOST else self._engine.prefill(new)
        try:
            guesses = [self._guess(last)]
            while len(guesses) < most:
                guesses.append(self._guess(self._engine.decode(guesses[-1])))
        except NotFiniteError:
            raise NotFiniteError(f"the draft {self._engine.bundle.path}") from None
        return guesses

    def _guess(self, logits: np.ndarray | Candidates) -> int:
        return self._greedy.pick(below(logits, self._num_pieces))


def check_draft(bundle: Bundle, draft: Bundle) -> None:
    """Raise an error if a draft bundle has another tokenizer than the bundle.

    Raises:
        RequestError: its tokenizer differs.
    """
    own, other = (b.files[b.tokenizer.file][1] for b in (bundle, draft))
    if (own, bundle.vocabulary_size) != (other, draft.vocabulary_size):
        raise RequestError(
            f"the draft {draft.path} has a different tokenizer from {bundle.path}; choose a "
            "draft with the same tokenizer"
        )


class Speculator:
    """Decodes with guesses; leaves the engine in the same state as plain decoding.

    It measures the gain of guessing. If guessing is slower, it pauses, longer each time.

    Args:
        engine: to run.
        drafter: guesses; `None` for plain decoding.
        prompt_ids: the tokens that the engine has run.
    """

    def __init__(
        self,
        engine: Engine | CandidateEngine,
        drafter: Drafter | None,
        prompt_ids: Sequence[int],
    ) -> None:
        self._engine = engine
        self._drafter = drafter
        self._text = list(prompt_ids)
        self._ahead: list[tuple[int, np.ndarray | Candidates]] = []
        self._length = _FEWEST
        self._drafted = self._accepted = 0
        self._seconds = 0.0
        self._plain_s: float | None = None
        self._pause = _PAUSE
        self._wait = 0

    @property
    def held(self) -> int:
        """Number of tokens that the engine would hold without guesses."""
        return len(self._engine.tokens) - len(self._ahead)

    def decode(self, token: int) -> np.ndarray | Candidates:
        """Add one token; the logits after it, as the engine's `decode`."""
        self._text.append(token)
        if self._ahead:
            guessed, logits = self._ahead[0]
            if guessed == token:
                del self._ahead[0]
                self._accepted += 1
                return logits
        self.settle()
        start = time.perf_counter()
        draft = self._draft()
        if not draft:
            start = time.perf_counter()
            logits = self._engine.decode(token)
            self._plain_s = _average(self._plain_s, time.perf_counter() - start)
            return logits
        first, *others = self._engine.extend([token, *draft])
        self._ahead = list(zip(draft, others, strict=True))
        self._drafted, self._accepted = len(draft), 0
        self._seconds = time.perf_counter() - start
        return first

    def _draft(self) -> list[int]:
        self._wait -= 1
        if self._drafter is None or self._plain_s is None or self._wait >= 0:
            return []
        most = self._engine.retractable(self._length)
        return self._drafter.draft(self._text, most) if most else []

    def settle(self) -> None:
        """Remove guessed tokens that were not reached, and measure the gain."""
        if self._drafted:
            if self._accepted == self._drafted:
                self._length = min(2 * self._drafted, _MOST)
            else:
                self._length = max(_FEWEST, self._accepted + 1)
            assert self._plain_s is not None
            if self._accepted and self._seconds < self._plain_s * (1 + self._accepted):
                self._pause = _PAUSE
            else:
                self._wait = self._pause
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._drafted = self._accepted = 0
        if self._ahead:
            self._engine.rewind(self.held)
            self._ahead = []


def _average(old: float | None, new: float) -> float:
    return new if old is None else 0.8 * old + 0.2 * new
