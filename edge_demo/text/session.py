"""A chat: turns of a user and a model, answered one after another on one generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_demo.engine.runner import OnProgress
from edge_demo.text.answer import Completion
from edge_demo.text.conversation import Conversation
from edge_demo.text.generator import CompletionStream, Generator
from edge_demo.text.sampling import Sampler
from edge_demo.text.speculate import Drafter


class ChatSession:
    """The turns of a conversation, in the bundle's template, or one text with a base model.

    What earlier turns left in the engine is used again: only a new turn is run. Where the turns
    fill the context, the oldest go.

    Args:
        generator: that answers; no other conversation runs on it meanwhile.
        sampler: chooses each token.
        max_tokens: the most of an answer.
        system: instructions before all turns; a base model has no place for them.
        drafter: guesses tokens ahead.
        stop: texts that end an answer and are not part of it.

    Attributes:
        dropped: how many of the user's messages went, their answers with them, to make room for
            the last one.
        system_ids: the tokens that every conversation begins with.
    """

    def __init__(
        self,
        generator: Generator,
        sampler: Sampler,
        max_tokens: int,
        system: str = "",
        drafter: Drafter | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.system_ids = generator.tokenizer.encode_system(system) if system else []
        self._generator = generator
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._drafter = drafter
        self._stop = stop
        self._turns = Conversation(
            generator.tokenizer, generator.engine.context_length, max_tokens, system
        )

    @property
    def dropped(self) -> int:
        return self._turns.dropped

    def __len__(self) -> int:
        """How many turns there are."""
        return len(self._turns)

    def send(
        self,
        message: str,
        on_prefill: OnProgress | None = None,
        on_held: Callable[[Completion], None] | None = None,
    ) -> CompletionStream:
        """Add a message of the user's; the answer comes as the stream is iterated.

        Then `keep` what came, or `take_back` the message.

        Args:
            message: of the user's.
            on_prefill, on_held: as of `Generator.stream`.

        Raises:
            RequestError: the message alone does not fit. The conversation is as it was.
            NotFiniteError: as `Generator.stream`.
        """
        ids = self._turns.ask(message)
        if self.dropped:
            self._generator.prepare(self.system_ids)
        return self._generator.stream(
            ids,
            self._sampler,
            self._max_tokens,
            self._drafter,
            on_prefill,
            self._stop,
            on_held,
            goes_on=True,
        )

    def keep(self, completion: Completion) -> bool:
        """Make an answer a turn; `False` where it was stopped before its first token, which takes
        the message back."""
        if completion.finish_reason == "interrupted" and not completion.ids:
            self.take_back()
            return False
        self._turns.answer(completion.text)
        return True

    def take_back(self) -> None:
        """Forget the last message, which has no answer."""
        self._turns.take_back()

    def clear(self) -> None:
        """Begin anew, as if nothing had been said."""
        self._turns.clear()
        self._generator.prepare(self.system_ids)
