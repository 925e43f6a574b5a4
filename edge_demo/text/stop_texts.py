"""Ends an answer at a stop text, also if the stop text does not begin or end at a token."""

from __future__ import annotations

from collections.abc import Sequence

from edge_demo.errors import RequestError

_MOST = 64
_LONGEST = 1000


def check_stop_texts(texts: str | Sequence[str]) -> tuple[str, ...]:
    """Checks one or several stop texts.

    Raises:
        RequestError: one is empty, too long or not UTF-8, or there are too many.
    """
    if isinstance(texts, str):
        texts = (texts,)
    if len(texts) > _MOST:
        raise RequestError(f"there can be at most {_MOST} stop texts, not {len(texts):,}")
    for text in texts:
        if not text:
            raise RequestError("a stop text must not be empty: it would end every answer at once")
        if len(text) > _LONGEST:
            raise RequestError(
                f"a stop text has {len(text):,} characters; the limit is {_LONGEST:,}"
            )
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError("a stop text must be valid UTF-8, because answers always are")
    return tuple(texts)


class StopTexts:
    """Watches a growing text; holds back text that may become a stop text.

    Args:
        texts: checked by `check_stop_texts`; without any, all text passes.

    Attributes:
        found: whether a stop text has occurred.
    """

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._texts = texts
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Returns the text that is certain now: up to the first stop text, which is excluded."""
        if not self._texts:
            return piece
        if self.found:
            return ""
        text = self._held + piece
        # The one that ends first, and of these the longest, independent of how the text was split.
        places = [(text.find(stop), len(stop)) for stop in self._texts]
        ends = [(place + length, place) for place, length in places if place >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max(_beginning_at_the_end(text, stop) for stop in self._texts)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns the held-back text at the end."""
        held, self._held = self._held, ""
        return held


def _beginning_at_the_end(text: str, stop: str) -> int:
    """How many of the last characters of a text may be the beginning of a stop text."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
