"""Lets no number in JSON grow without end.

A schema puts no limit on digits, and a small model that has begun to write zeros does not stop.
A double has 17 significant digits (RFC 8259, section 6, on what JSON's readers agree about).
"""

from __future__ import annotations

import numpy as np

MOST_DIGITS = 24
_OF_NUMBERS = b"0123456789.eE+-"
_BEGINNINGS = b"{[`0123456789-"


class NumberWatch:
    """Follows an answer, byte by byte.

    Args:
        digits: ids of the tokens that begin with a digit.
    """

    def __init__(self, digits: np.ndarray) -> None:
        self._digits = digits
        self._is_json: bool | None = None
        self._in_string = self._escaped = False
        self._length = 0

    def take(self, piece: bytes) -> None:
        """Go on after a token with these bytes."""
        for byte in piece:
            if self._is_json is None:
                self._is_json = byte in _BEGINNINGS
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == ord("\\"):
                    self._escaped = True
                elif byte == ord('"'):
                    self._in_string = False
            elif byte == ord('"'):
                self._in_string = True
            outside = not self._in_string and byte in _OF_NUMBERS
            self._length = self._length + 1 if outside else 0

    @property
    def forbidden(self) -> np.ndarray | None:
        """Ids of tokens that would make a number too long, while one is as long as it may be."""
        return self._digits if self._is_json and self._length >= MOST_DIGITS else None
