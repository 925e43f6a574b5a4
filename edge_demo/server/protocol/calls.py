"""Makes text and calls of tools of what an answer says."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from edge_demo.server.protocol.answer import CallPiece, Choice
from edge_demo.tool_calls.call_reader import BegunCall, CallReader, Said, SaidText


class SaidSoFar:
    """What one choice has said.

    Args:
        index: of the choice.
        tool_names: of the tools that it may call.

    Attributes:
        calls: that it has begun, with their arguments so far.
    """

    def __init__(self, index: int, tool_names: Sequence[str]) -> None:
        self.calls: list[CallPiece] = []
        self._index = index
        self._texts: list[str] = []
        self._reader = CallReader(tool_names) if tool_names else None

    def add(self, text: str) -> Choice:
        """The next piece of what the model wrote, as far as it is certain what it is."""
        if self._reader is None:
            self._texts.append(text)
            return Choice(self._index, text)
        return self._piece(self._reader.push(text))

    def finish(self) -> Choice:
        """The piece that was uncertain until the end."""
        return self._piece(self._reader.finish() if self._reader else [])

    def fill(self, choice: Choice) -> None:
        """Give a choice all of it."""
        self.finish()
        choice.text, choice.calls = "".join(self._texts), self.calls

    def _piece(self, said: list[Said]) -> Choice:
        piece = Choice(self._index)
        for one in said:
            if isinstance(one, SaidText):
                self._texts.append(one.text)
                piece.text += one.text
                continue
            if isinstance(one, BegunCall):
                call = CallPiece(len(self.calls), f"call_{secrets.token_hex(12)}", one.name)
                self.calls.append(call)
                piece.calls.append(CallPiece(call.number, call.id, call.name))
                continue
            call = self.calls[-1]
            call.arguments += one.text
            piece.calls.append(CallPiece(call.number, call.id, None, one.text))
        return piece
