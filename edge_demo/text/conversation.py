"""Keeps the turns of a conversation, and decides what happens when the context is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from edge_demo.errors import RequestError
from edge_demo.text.tokenizer import Tokenizer

Overflow = Literal["stop", "drop-oldest"]
OVERFLOWS: tuple[str, ...] = get_args(Overflow)


class Conversation:
    """Alternating turns of a user and a model; the user begins.

    Args:
        tokenizer: of the bundle. With a base model the turns are one text.
        context_length: maximum number of tokens.
        answer_tokens: how many an answer may have; a quarter of the context at most is kept for it.
        system: system text before all turns, which is never dropped.
        overflow: what happens to a message for which there is no room: the oldest turns are
            dropped, or the message is refused.

    Attributes:
        answer_tokens, system, overflow: as they were given; they may be changed at any time.
        dropped: number of user messages, with their answers, that were dropped to make room for the
            last one.
        dropped_tokens: how many tokens they had.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        answer_tokens: int,
        system: str = "",
        overflow: Overflow = "drop-oldest",
    ) -> None:
        self._tokenizer = tokenizer
        self._context = context_length
        self._turns: list[tuple[str, str]] = []
        self.answer_tokens = answer_tokens
        self.system = system
        self.overflow: Overflow = overflow
        self.dropped = 0
        self.dropped_tokens = 0

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The turns, oldest first, as `Tokenizer.encode_chat` takes them."""
        return tuple(self._turns)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of system text and turns, without the beginning of the next turn."""
        return self._count(self._turns, self.system)

    def ask(self, message: str) -> list[int]:
        """Add a user message; returns the tokens of the prompt.

        If it does not fit and `overflow` is `drop-oldest`, the oldest turns are dropped until half
        of their space is free. The remaining turns must be run again, so this must not happen at
        every message. If `overflow` is `stop`, all of the context is used.

        Raises:
            RequestError: the message alone does not fit, or not after the others with `stop`. The
                conversation is unchanged.
        """
        turns = [*self._turns, ("user", message)]
        ids = self._encode(turns)
        whole, limit = len(ids), self._context - min(self.answer_tokens, self._context // 4)
        if self.overflow == "drop-oldest" and whole > limit and len(turns) > 1:
            alone = len(self._encode(turns[-1:]))
            room = (alone + max(alone, limit)) // 2
            while len(ids) > room and len(turns) > 1:
                del turns[:2]
                ids = self._encode(turns)
        if len(ids) > self._context:
            raise RequestError(self._too_long(len(ids), alone=len(turns) == 1))
        self.dropped = (len(self._turns) + 1 - len(turns)) // 2
        self.dropped_tokens = whole - len(ids)
        self._turns = turns
        return ids

    def _too_long(self, tokens: int, alone: bool) -> str:
        if alone:
            return (
                f"this message makes a prompt of {tokens:,} tokens, but the context holds "
                f"{self._context:,}"
            )
        before = self.num_tokens
        return (
            f"the conversation has {before:,} tokens and this message {tokens - before:,}, but the "
            f"context holds {self._context:,}; /clear begins a new conversation, /set overflow "
            "drop-oldest drops the oldest messages"
        )

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self._turns.append(("model", text))

    def take_back(self) -> None:
        """Remove the last user message, if it has no answer."""
        if len(self._turns) % 2:
            del self._turns[-1]

    def undo(self) -> tuple[str, str] | None:
        """Remove the last user message and its answer.

        Returns:
            Both, or `None` if there are none.
        """
        if len(self._turns) < 2:
            return None
        (_, message), (_, answer) = self._turns[-2:]
        del self._turns[-2:]
        return message, answer

    def put_back(self, message: str, answer: str) -> None:
        """Add what `undo` removed."""
        self._turns += [("user", message), ("model", answer)]

    def replace(self, system: str, turns: Sequence[tuple[str, str]]) -> None:
        """Go on from another conversation.

        Args:
            system: its system text, which may be empty.
            turns: the model's is the last one.

        Raises:
            RequestError: it does not fit the context. The conversation is unchanged.
        """
        tokens = self._count(turns, system)
        if tokens > self._context:
            raise RequestError(
                f"that conversation has {tokens:,} tokens, but the context holds {self._context:,}"
            )
        self.system = system
        self._turns = list(turns)

    def clear(self) -> None:
        """Remove all turns."""
        self._turns.clear()

    def _count(self, turns: Sequence[tuple[str, str]], system: str) -> int:
        chat = self._tokenizer.spec.chat
        if chat is None:
            return len(self._encode(turns)) if turns else 0
        if not turns:
            return len(self._tokenizer.encode_system(system)) if system else 0
        opening = 1 + len(self._tokenizer.encode(f"{chat.model}\n", bos=False))
        return len(self._tokenizer.encode_chat(turns, system)) - opening

    def _encode(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        if self._tokenizer.spec.chat is not None:
            return self._tokenizer.encode_chat(turns, self.system)
        return self._tokenizer.encode("".join(text for _, text in turns))
