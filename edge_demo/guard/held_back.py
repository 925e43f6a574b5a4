"""Holds pieces of an answer back until a guard has judged the text with them in it."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class HeldBack(Generic[T]):
    """The pieces of one answer since the last judgment.

    Args:
        every: how many pieces make a judgment due; a piece is about a token.

    Attributes:
        text: of the answer, with what is held back.
    """

    def __init__(self, every: int) -> None:
        self.text = ""
        self._every = every
        self._pieces: list[T] = []
        self._judged = 0  # characters of the text

    def add(self, piece: T, text: str) -> None:
        """Hold a piece with a text."""
        self._pieces.append(piece)
        self.text += text

    @property
    def is_due(self) -> bool:
        """Whether it is time for a judgment."""
        return len(self._pieces) >= self._every

    @property
    def has_news(self) -> bool:
        """Whether there is text that no judgment has seen."""
        return len(self.text) > self._judged

    def release(self) -> list[T]:
        """The pieces, whose text has been judged."""
        self._judged = len(self.text)
        pieces, self._pieces = self._pieces, []
        return pieces
