"""Reads calls from an answer's text while it comes, where `json_style.grammar` was kept to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from edge_demo.tool_calls import json_style


class SaidText(NamedTuple):
    """A piece of the answer's text.

    Attributes:
        text: of it.
    """

    text: str


class BegunCall(NamedTuple):
    """A call begins.

    Attributes:
        name: of the tool.
    """

    name: str


class SaidArguments(NamedTuple):
    """A piece of the arguments of the call that was begun last.

    Attributes:
        text: of their JSON.
    """

    text: str


Said = SaidText | BegunCall | SaidArguments


class _ObjectEnd:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """How many of the characters belong to the object, if it ends in them."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return place + 1
        return None


class CallReader:
    """Splits an answer into text and calls.

    Args:
        names: of the tools that the answer may call.
    """

    def __init__(self, names: Iterable[str]) -> None:
        heads = {name: json_style.head(name) for name in names}
        fences = ("", *json_style.FENCES)
        self._first = [
            (f"{fence}{bracket}{head}", name)
            for name, head in heads.items()
            for fence in fences
            for bracket in ("", "[")
        ]
        # After the brace that ends a call: the list goes on, or all that comes is its end.
        self._next = [
            (f"}}{json_style.CALL_SEPARATOR}{head}", name) for name, head in heads.items()
        ]
        self._held = ""
        self._text = False
        self._arguments: _ObjectEnd | None = None
        self._calls = 0

    def push(self, text: str) -> list[Said]:
        """What has become certain with the next piece of the answer's text."""
        said: list[Said] = []
        self._held += text
        while self._held:
            if self._text:
                said.append(SaidText(self._held))
                self._held = ""
            elif self._arguments is not None:
                self._read_arguments(self._arguments, said)
            elif not self._begin(said):
                break
        return said

    def finish(self) -> list[Said]:
        """What was held back at the answer's end, if it is text."""
        held, self._held = self._held, ""
        return [SaidText(held)] if held and not self._calls else []

    def _begin(self, said: list[Said]) -> bool:
        """Begin a call or the text, unless more must come before it is certain."""
        heads = self._next if self._calls else self._first
        for head, name in heads:
            if self._held.startswith(head):
                self._held = self._held[len(head) :]
                self._calls += 1
                self._arguments = _ObjectEnd()
                said.append(BegunCall(name))
                return True
        if self._calls or any(head.startswith(self._held) for head, _ in heads):
            return False
        self._text = True
        return True

    def _read_arguments(self, end: _ObjectEnd, said: list[Said]) -> None:
        count = end.find(self._held)
        piece = self._held[:count]
        self._held = self._held[len(piece) :]
        if piece:
            said.append(SaidArguments(piece))
        if count is not None:
            self._arguments = None
