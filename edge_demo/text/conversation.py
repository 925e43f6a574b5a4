"""A conversation: its turns, of which the oldest go when the context is full."""

from __future__ import annotations

from edge_demo.errors import RequestError
from edge_demo.text.tokenizer import Tokenizer


class Conversation:
    """Turns of a user and a model, by turns, the user's first.

    Args:
        tokenizer: of the bundle. With a base model the turns are one text.
        context_length: the most tokens there may be.
        answer_tokens: how many an answer may have; a quarter of the context at most is kept for it.
        system: instructions that stand before all turns; they are never dropped.

    Attributes:
        dropped: how many of the user's messages went, their answers with them, to make room for the
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
        """Add a message of the user's; the tokens to go on from.

        Where it does not fit, so many of the oldest turns go that half of the room for them is
        free: what is left is run again, which is not to happen at every message.

        Raises:
            RequestError: the message alone does not fit. The conversation is as it was.
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
                f"the message has {len(ids):,} tokens, including the system text and the "
                f"turn template, but the context holds only {self._context:,}"
            )
        self.dropped = (len(self._turns) + 1 - len(turns)) // 2
        self._turns = turns
        return ids

    def answer(self, text: str) -> None:
        """Add what the model said."""
        self._turns.append(("model", text))

    def take_back(self) -> None:
        """Forget the last message of the user's, which has no answer."""
        del self._turns[-1:]

    def clear(self) -> None:
        """Begin anew."""
        self._turns.clear()

    def _encode(self, turns: list[tuple[str, str]]) -> list[int]:
        if self._tokenizer.spec.chat is not None:
            return self._tokenizer.encode_chat(turns, self._system)
        return self._tokenizer.encode("".join(text for _, text in turns))
