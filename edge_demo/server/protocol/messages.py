"""Reads conversations: what OpenAI's clients send becomes a system text and turns.

Gemma's template knows a user and a model who take turns. Messages of one role that follow each
other are one turn, with a blank line between them. System and developer messages come first.
What tools return stands in a user's turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.tools import read_call
from edge_demo.tool_calls.json_style import call_text, instructions, result_text
from edge_demo.tool_calls.tool import Call, Offer, Result
from edge_demo.turns import BLANK_LINE

MOST_MESSAGES = 2048
_MOST_PARTS = 256
_SYSTEM = ("system", "developer")
_TURNS = {"user": "user", "assistant": "model", "tool": "user"}
_ROLES = (*_SYSTEM, *_TURNS)
_MOST_CALLS = 128

Turns = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Message:
    """What somebody said.

    Attributes:
        role: of OpenAI's.
        text: of the message.
        calls: of tools, by an assistant.
    """

    role: str
    text: str
    calls: tuple[Call, ...] = ()


@dataclasses.dataclass
class KnownCalls:
    """The calls of earlier messages, which results are of."""

    names: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, fields: Fields, id_name: str, call: Call) -> Call:
        """Note a call by its id.

        Raises:
            Refusal: it has no id.
        """
        call_id = fields.text(id_name)
        if not call_id:
            raise fields.wrong(id_name, "the id of a call")
        self.names[call_id] = call.name
        return call

    def result(self, fields: Fields, id_name: str, content: str) -> Message:
        """What a call returned.

        Raises:
            Refusal: there is no such call before.
        """
        call_id = fields.text(id_name)
        name = self.names.get(call_id or "")
        if name is None:
            raise fields.wrong(id_name, "the id of a call in an earlier message")
        return Message("tool", result_text(Result(name, content)))


def read_conversation(
    fields: Fields, offer: Offer | None = None, name: str = "messages"
) -> tuple[str, Turns]:
    """The conversation of a request, which waits for an answer.

    Args:
        fields: of the request.
        offer: of tools.
        name: of the field with the messages.

    Returns:
        The system text, which may be empty, and turns as `Tokenizer.encode_chat` takes them.

    Raises:
        Refusal: it has another form, or is not a user's turn.
    """
    messages = fields.items(name, MOST_MESSAGES)
    if not messages:
        raise Refusal(f"{name} must be a list of messages, at least one", param=name)
    known = KnownCalls()
    read = [_read(Fields(m, f"{name}[{i}]"), known) for i, m in enumerate(messages)]
    return as_turns(read, name, offer)


def as_turns(messages: list[Message], name: str, offer: Offer | None = None) -> tuple[str, Turns]:
    """System text and turns of messages.

    Args:
        messages: oldest first.
        name: of the field that they come from.
        offer: of tools, which the system text ends with.

    Raises:
        Refusal: they are no conversation that waits for an answer.
    """
    count = next((i for i, m in enumerate(messages) if m.role not in _SYSTEM), len(messages))
    system = [message.text for message in messages[:count]]
    if offer is not None:
        system.append(instructions(offer))
    turns: list[tuple[str, list[Message]]] = []
    for number, message in enumerate(messages[count:], start=count):
        if message.role not in _TURNS:
            raise Refusal(
                f"{name}[{number}] has the role {message.role!r}; system messages must come "
                "before all others",
                param=name,
            )
        speaker = _TURNS[message.role]
        if turns and turns[-1][0] == speaker:
            turns[-1][1].append(message)
        else:
            turns.append((speaker, [message]))
    if not turns or turns[0][0] != "user":
        raise Refusal(f"the first of {name} after system messages must be a user's", param=name)
    if turns[-1][0] != "user":
        raise Refusal(
            f"the last of {name} must be a user's; this server does not continue an answer",
            param=name,
        )
    return BLANK_LINE.join(system), tuple((speaker, _text(said)) for speaker, said in turns)


def _text(messages: Iterable[Message]) -> str:
    """The text of one turn."""
    texts = [m.text for m in messages if m.text or not m.calls]
    calls = [call for m in messages for call in m.calls]
    return BLANK_LINE.join([*texts, call_text(calls)] if calls else texts)


def _read(message: Fields, known: KnownCalls) -> Message:
    role = message.choice("role", _ROLES)
    if role is None:
        raise message.wrong("role", " or ".join(map(repr, _ROLES)))
    message.refuse("function_call", "functions are called by tool_calls")
    message.refuse("audio", "this server takes texts only")
    if role == "tool":
        return known.result(message, "tool_call_id", content_text(message, "content", ("text",)))
    calls = []
    if role == "assistant":
        for number, value in enumerate(message.items("tool_calls", _MOST_CALLS) or []):
            fields = Fields(value, f"{message.where('tool_calls')}[{number}]")
            function = fields.inner("function")
            if function is None:
                raise fields.wrong("function", "an object with name and arguments")
            calls.append(known.add(fields, "id", read_call(function)))
    silent = calls and message.any("content") is None
    text = "" if silent else content_text(message, "content", ("text",))
    return Message(role, text, tuple(calls))


def content_text(message: Fields, name: str, kinds: tuple[str, ...]) -> str:
    """The text of a content, which is text or a list of parts.

    Args:
        message: that has it.
        name: of the field.
        kinds: of the parts that are text.

    Raises:
        Refusal: it is neither, or has other parts, such as images.
    """
    content: Any = message.any(name)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise message.wrong(name, "text, or a list of parts")
    texts = []
    for number, part in enumerate(message.items(name, _MOST_PARTS) or []):
        fields = Fields(part, f"{message.where(name)}[{number}]")
        kind = fields.any("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise Refusal(
                f"{fields.where('type')} is {str(kind)[:40]!r}; this server takes texts only",
                code="unsupported",
                param=fields.where("type"),
            )
        text = fields.text("text")
        if text is None:
            raise fields.wrong("text", "text")
        texts.append(text)
    return "".join(texts)
