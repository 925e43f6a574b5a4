"""Has a guard judge the messages and answers of `chat`."""

from __future__ import annotations

from typing import Protocol

from edge_demo.errors import RequestError
from edge_demo.guard.decisions import Guard
from edge_demo.guard.held_back import HeldBack


class Watched(Protocol):
    """An answer as it is shown."""

    def push(self, text: str) -> str:
        """Add text; returns what may be shown now."""
        ...

    def finish(self) -> str:
        """The rest, when no more text comes."""
        ...


class Unwatched:
    """An answer that nothing judges."""

    def push(self, text: str) -> str:
        """The text itself."""
        return text

    def finish(self) -> str:
        """Nothing more."""
        return ""


class ChatGuard:
    """The guard of a chat.

    Args:
        guard: that judges.
        on: `input`, `output` or `both`.
        every: pieces of an answer that are judged at once.
    """

    def __init__(self, guard: Guard, on: str, every: int) -> None:
        self._guard = guard
        self._on = on
        self._every = every

    def admit(self, message: str) -> None:
        """Judge a message.

        Raises:
            RequestError: it violates a policy, or does not fit the guard's context.
        """
        if self._on != "output":
            self._check("refused the message", message, None)

    def watch(self, message: str) -> Watched:
        """What judges the answer to a message."""
        return Unwatched() if self._on == "input" else _WatchedAnswer(self, message, self._every)

    def check_answer(self, message: str, answer: str) -> None:
        """Judge an answer as far as it has come; errors as `admit`."""
        self._check("ended the answer", message, answer)

    def _check(self, what: str, message: str, answer: str | None) -> None:
        verdict = self._guard.decide("chat", message, answer)
        if verdict.violated:
            raise RequestError(f"the guard {what}, because of {verdict.reasons}")


class _WatchedAnswer:
    """Text that is held back until the guard has judged it."""

    def __init__(self, guard: ChatGuard, message: str, every: int) -> None:
        self._guard = guard
        self._message = message
        self._held: HeldBack[str] = HeldBack(every)

    def push(self, text: str) -> str:
        """Add text; errors as `ChatGuard.admit`."""
        self._held.add(text, text)
        return self.finish() if self._held.is_due else ""

    def finish(self) -> str:
        """The text that was held back; errors as `ChatGuard.admit`."""
        if self._held.has_news:
            self._guard.check_answer(self._message, self._held.text)
        return "".join(self._held.release())
