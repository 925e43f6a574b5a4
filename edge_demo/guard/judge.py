"""Asks a guard about texts: the probability of Yes for each policy.

The text stands before the policy. So the engine holds the beginning with the text once, and each
policy takes only its own tokens and the epilogue's. An answer that is being written goes on from
its last whole unit of tokens: see `edge_demo.engine.prompt_chunks`. What a text gets does not
depend on what was judged before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from edge_demo.engine.prefixes import PrefixStore
from edge_demo.engine.runner import Engine, common_prefix
from edge_demo.errors import BundleError, NotFiniteError, RequestError
from edge_demo.guard.template import END, NO, POLICIES, START, YES, Policy, template_for
from edge_demo.text.tokenizer import Tokenizer


class TooLongError(RequestError):
    """A text and a policy do not fit the guard's context."""


@dataclasses.dataclass
class TokenCounts:
    """Tokens since the start.

    Attributes:
        texts: of beginnings with a text that were run.
        reused: of such beginnings that were held already.
        policies: of policies and epilogues, which are run for each text.
    """

    texts: int = 0
    reused: int = 0
    policies: int = 0


class Judge:
    """Gives probabilities that texts violate policies.

    Args:
        engine: of a guard's bundle, with the logits of all tokens; used by nothing else.
        tokenizer: of the same bundle.
        policies: to judge by.
        cache_bytes: that keys and values of earlier texts may take.

    Attributes:
        policies: as they were given.
        counts: of tokens.

    Raises:
        BundleError: the tokenizer lacks the tokens of turns, Yes or No.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        policies: Sequence[Policy] = POLICIES,
        cache_bytes: int = 0,
    ) -> None:
        self.policies = tuple(policies)
        self.counts = TokenCounts()
        self._engine = engine
        self._tokenizer = tokenizer
        self._prefixes = PrefixStore(cache_bytes)
        self._namespace = ""  # of what the engine holds
        self._turns = [self._control(mark) for mark in (START, END)]
        self._yes, self._no = (self._word(word) for word in (YES, NO))

    def _control(self, mark: str) -> int:
        found = self._tokenizer.control_id(mark)
        if found is None:
            name = self._engine.bundle.name
            raise BundleError(f"{name} cannot be a guard: its tokenizer lacks the token {mark}")
        return found

    def _word(self, word: str) -> int:
        ids = self._tokenizer.encode(word, bos=False)
        if len(ids) != 1:
            name = self._engine.bundle.name
            raise BundleError(f"{name} cannot be a guard: {word} is not one token of it")
        return ids[0]

    def encode(self, policy: Policy, prompt: str, response: str | None = None) -> list[int]:
        """The ids of a question to the guard; no text of users becomes a control token.

        Args:
            policy: to judge by.
            prompt: what a user wrote.
            response: what a model answered to it, where that is judged.
        """
        first, *rest = template_for(response).segments(policy, prompt, response)
        ids = self._tokenizer.encode(first)
        for number, text in enumerate(rest):
            ids += [self._turns[number % 2], *self._tokenizer.encode(text, bos=False)]
        return ids

    def probabilities(
        self, prompt: str, response: str | None = None, namespace: str = ""
    ) -> dict[str, float]:
        """How likely the guard says Yes and not No, for each policy.

        Args:
            prompt: what a user wrote.
            response: what a model answered to it, where that is judged.
            namespace: keys and values are shared only within one.

        Returns:
            By the name of the policy, 0 to 1.

        Raises:
            TooLongError: they do not fit the guard's context.
            NotFiniteError: the guard's logits are not finite.
        """
        asked = [self.encode(policy, prompt, response) for policy in self.policies]
        longest = max(map(len, asked))
        if longest > self._engine.context_length:
            raise TooLongError(
                f"the guard's context holds {self._engine.context_length:,} tokens, but the text "
                f"with the longest policy has {longest:,}"
            )
        shared = _shared(asked)
        self._hold(asked[0][:shared], namespace)
        own = longest - shared
        moves_on = self._engine.retractable(own) < own  # a sliding window does
        kept = self._engine.snapshot().copy() if moves_on else None
        found = {}
        for policy, ids in zip(self.policies, asked, strict=True):
            found[policy.name] = self._yes_after(ids[shared:])
            if kept is None:
                self._engine.rewind(shared)
            else:
                self._engine.restore(kept)
        return found

    def _hold(self, ids: list[int], namespace: str) -> None:
        if namespace != self._namespace:
            self._engine.rewind(0)
            self._namespace = namespace
        saved, snapshot = self._prefixes.best(namespace, self._engine, ids)
        if snapshot and saved > self._engine.saved_by(self._engine.snapshot(), ids):
            self._engine.restore(snapshot)
        reused = self._engine.hold(ids)
        self._prefixes.keep(namespace, self._engine)
        self.counts.reused += reused
        self.counts.texts += len(ids) - reused

    def _yes_after(self, ids: list[int]) -> float:
        """Run the rest of a question: the softmax over the two logits."""
        logits = self._engine.prefill(ids)
        self.counts.policies += len(ids)
        yes, no = float(logits[self._yes]), float(logits[self._no])
        if not (math.isfinite(yes) and math.isfinite(no)):
            raise NotFiniteError("the guard")
        return 1 / (1 + math.exp(min(no - yes, 700.0)))


def _shared(asked: Sequence[Sequence[int]]) -> int:
    """How many first tokens all questions have; each has at least one more."""
    first = asked[0]
    shared = min(common_prefix(first, other) for other in asked)
    return min(shared, min(map(len, asked)) - 1)
