"""A chat: turns of a user and a model, answered one after another on one generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from edge_demo.engine.runner import OnProgress
from edge_demo.errors import RequestError
from edge_demo.text.answer import Completion
from edge_demo.text.conversation import Conversation, Overflow
from edge_demo.text.generator import CompletionStream, Generator, Place
from edge_demo.text.sampling import Sampler
from edge_demo.text.speculate import Drafter

_ANYWHERE: Place = (0, 0)


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """A message and its answer, and what the generator went on from before them."""

    message: str
    answer: str
    place: Place


class ChatSession:
    """The turns of a conversation, in the bundle's template, or one text with a base model.

    What earlier turns left in the engine is used again: only a new turn is run. Where the turns
    fill the context, the oldest go, or a message is refused.

    Args:
        generator: that answers; no other conversation runs on it meanwhile.
        sampler: chooses each token.
        max_tokens: the most of an answer.
        system: instructions before all turns; a base model has no place for them.
        drafter: guesses tokens ahead.
        stop: texts that end an answer and are not part of it.
        overflow: what happens to a message for which the context has no room: `drop-oldest` or
            `stop`.

    Attributes:
        sampler: as it was given; another one chooses from the next answer on.
        max_tokens, overflow: as they were given; they may be changed, too.
        dropped: how many of the user's messages went, their answers with them, to make room for
            the last one.
        dropped_tokens: how many tokens these had.
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
        overflow: Overflow = "drop-oldest",
    ) -> None:
        self.system_ids = generator.tokenizer.encode_system(system) if system else []
        self.sampler = sampler
        self._generator = generator
        self._drafter = drafter
        self._stop = stop
        self._turns = Conversation(
            generator.tokenizer, generator.engine.context_length, max_tokens, system, overflow
        )
        self._places: list[Place] = []  # of each message, what the generator went on from
        self._place = _ANYWHERE  # of the last message
        self._former: _Exchange | None = None  # while its message is answered again

    @property
    def dropped(self) -> int:
        return self._turns.dropped

    @property
    def dropped_tokens(self) -> int:
        return self._turns.dropped_tokens

    @property
    def max_tokens(self) -> int:
        return self._turns.answer_tokens

    @max_tokens.setter
    def max_tokens(self, count: int) -> None:
        self._turns.answer_tokens = count

    @property
    def overflow(self) -> Overflow:
        return self._turns.overflow

    @overflow.setter
    def overflow(self, overflow: Overflow) -> None:
        self._turns.overflow = overflow

    @property
    def system(self) -> str:
        """The system text; empty if there is none."""
        return self._turns.system

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The turns, oldest first: `("user" or "model", text)`."""
        return self._turns.turns

    @property
    def num_tokens(self) -> int:
        """How many tokens of the context the conversation takes."""
        return self._turns.num_tokens

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
            RequestError: the message alone does not fit, or not after the others with the overflow
                `stop`. The conversation is as it was.
            NotFiniteError: as `Generator.stream`.
        """
        self._place = self._generator.place
        try:
            ids = self._turns.ask(message)
            if self.dropped:
                self._places = [_ANYWHERE] * (len(self) // 2)
                self._generator.prepare(self.system_ids)
                self._place = self._generator.place
            return self._generator.stream(
                ids,
                self.sampler,
                self.max_tokens,
                self._drafter,
                on_prefill,
                self._stop,
                on_held,
                goes_on=True,
            )
        except BaseException:
            self.take_back()
            raise

    def send_again(self, on_prefill: OnProgress | None = None) -> CompletionStream:
        """Answer the last message once more.

        Then `keep` what came instead of the former answer, or `take_back`, which keeps the former
        one.

        Args:
            on_prefill: as of `Generator.stream`.

        Raises:
            RequestError: there is no answer yet.
            NotFiniteError: as `Generator.stream`.
        """
        former = self._undo()
        if former is None:
            raise RequestError("there is no answer yet")
        self._former = former
        return self.send(former.message, on_prefill)

    def keep(self, completion: Completion) -> bool:
        """Make an answer a turn; `False` where it was stopped before its first token, which takes
        the message back."""
        if completion.finish_reason == "interrupted":
            if not completion.ids:
                self.take_back()
                return False
            # The prompt was run, and all of the answer but its last token.
            prompt = len(completion.prompt_ids)
            self._generator.place = prompt, prompt + len(completion.ids) - 1
        self._turns.answer(completion.text)
        self._places.append(self._place)
        self._former = None
        return True

    def take_back(self) -> None:
        """Forget the last message, which has no answer, as if it had not been sent."""
        self._turns.take_back()
        self._generator.place = self._place
        former, self._former = self._former, None
        if former is not None:
            self._turns.put_back(former.message, former.answer)
            self._places.append(former.place)

    def undo(self) -> str | None:
        """Forget the last message and its answer.

        Returns:
            The message; `None` if there is none.
        """
        exchange = self._undo()
        return None if exchange is None else exchange.message

    def _undo(self) -> _Exchange | None:
        last = self._turns.undo()
        if last is None:
            return None
        self._generator.place = self._places.pop()
        return _Exchange(*last, self._generator.place)

    def replace(self, system: str, turns: Sequence[tuple[str, str]]) -> None:
        """Go on from another conversation.

        Args:
            system: its system text, which may be empty.
            turns: oldest first, the model's is the last one.

        Raises:
            RequestError: it does not fit the context, or the model has no system text. The
                conversation is as it was.
        """
        tokenizer = self._generator.tokenizer
        system_ids = tokenizer.encode_system(system) if system else []
        self._turns.replace(system, turns)
        self.system_ids = system_ids
        self._places = [_ANYWHERE] * (len(self) // 2)
        self._generator.place = _ANYWHERE

    def clear(self) -> None:
        """Begin anew, as if nothing had been said."""
        self._turns.clear()
        self._places.clear()
        self._generator.prepare(self.system_ids)
