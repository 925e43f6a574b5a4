"""Keeps the turns of a conversation, and drops the oldest when the context is full."""

from __future__ import annotations

from edge_demo.errors import RequestError
from edge_demo.text.tokenizer import Tokenizer


class Conversation:
    """Alternating turns of a user and a model; the user begins.

    Args:
        tokenizer: of the bundle. With a base model the turns are one text.
        context_length: maximum number of tokens.
        answer_tokens: how many an answer may have; a quarter of the context at most is kept for it.
        system: system text before all turns, which is never dropped.

    Attributes:
        dropped: number of user messages, with their answers, that were dropped to make room for the
            last one.
    """

    def __init__(
        self, tokenizer: Tokenizer, context_length: int, answer_tokens: int, system: str = ""
    ) -> None:
        self._tokenizer = tokenizer
        self._context = context_length
        self._limit = context_length - min(answer_tokens, context_length // 4)
        self._system = system
        self._turns: list[tuple[str, str]] = []
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._turns)

    def ask(self, message: str) -> list[int]:
        """Add a user message; returns the tokens of the prompt.

        If it does not fit, the oldest turns are dropped until half of their space is free. The
        remaining turns must be run again, so this must not happen at every message.

        Raises:
            RequestError: the message alone does not fit. The conversation is unchanged.
        """
        turns = [*self._turns, ("user", message)]
        ids = self._encode(turns)
        if len(ids) > self._limit and len(turns) > 1:
            alone = len(self._encode(turns[-1:]))
            room = (alone + max(alone, self._limit)) // 2
            while len(ids) > room and len(turns) > 1:
                del turns[:2]
                ids = self._encode(turns)
        if len(ids) > self._context:
            raise RequestError(
                f"this message makes a prompt of {len(ids):,} tokens, but the context holds "
                f"{self._context:,}"
            )
        self.dropped = (len(self._turns) + 1 - len(turns)) // 2
        self._turns = turns
        return ids

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self._turns.append(("model", text))

    def take_back(self) -> None:
        """Remove the last user message, which has no answer."""
        del self._turns[-1:]

    def clear(self) -> None:
        """Remove all turns."""
        self._turns.clear()

    def _encode(self, turns: list[tuple[str, str]]) -> list[int]:
        if self._tokenizer.spec.chat is not None:
            return self._tokenizer.encode_chat(turns, self._system)
        return self._tokenizer.encode("".join(text for _, text in turns))
