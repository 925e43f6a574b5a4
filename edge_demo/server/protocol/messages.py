"""Reads conversations: what OpenAI's clients send becomes a system text and turns.

Gemma's template knows a user and a model who take turns. Messages of one role that follow each
other are one turn, with a blank line between them. System and developer messages come first.
"""

from __future__ import annotations

from typing import Any

from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.turns import BLANK_LINE

MOST_MESSAGES = 2048
_MOST_PARTS = 256
_SYSTEM = ("system", "developer")
_TURNS = {"user": "user", "assistant": "model"}
_ROLES = (*_SYSTEM, *_TURNS, "tool", "function")
_NO_TOOLS = "this server does not take tool calls yet"

Turns = tuple[tuple[str, str], ...]


def read_conversation(fields: Fields, name: str = "messages") -> tuple[str, Turns]:
    """The conversation of a request, which waits for an answer.

    Args:
        fields: of the request.
        name: of the field with the messages.

    Returns:
        The system text, which may be empty, and turns as `Tokenizer.encode_chat` takes them.

    Raises:
        Refusal: it has another form, or is not a user's turn.
    """
    messages = fields.items(name, MOST_MESSAGES)
    if not messages:
        raise Refusal(f"{name} must be a list of messages, at least one", param=name)
    return as_turns([_read(Fields(m, f"{name}[{i}]")) for i, m in enumerate(messages)], name)


def as_turns(messages: list[tuple[str, str]], name: str) -> tuple[str, Turns]:
    """System text and turns of messages.

    Args:
        messages: role and text of each.
        name: of the field that they come from.

    Raises:
        Refusal: they are no conversation that waits for an answer.
    """
    count = next((i for i, (role, _) in enumerate(messages) if role not in _SYSTEM), len(messages))
    system = BLANK_LINE.join(text for _, text in messages[:count])
    turns: list[tuple[str, str]] = []
    for number, (role, text) in enumerate(messages[count:], start=count):
        if role not in _TURNS:
            raise Refusal(
                f"{name}[{number}] has the role {role!r}; system messages must come before all "
                "others",
                param=name,
            )
        speaker = _TURNS[role]
        if turns and turns[-1][0] == speaker:
            turns[-1] = speaker, f"{turns[-1][1]}{BLANK_LINE}{text}"
        else:
            turns.append((speaker, text))
    if not turns or turns[0][0] != "user":
        raise Refusal(f"the first of {name} after system messages must be a user's", param=name)
    if turns[-1][0] != "user":
        raise Refusal(
            f"the last of {name} must be a user's; this server does not continue an answer",
            param=name,
        )
    return system, tuple(turns)


def _read(message: Fields) -> tuple[str, str]:
    role = message.choice("role", _ROLES)
    if role is None:
        raise message.wrong("role", " or ".join(map(repr, _ROLES)))
    if role in ("tool", "function"):
        raise Refusal(_NO_TOOLS, code="unsupported", param=message.where("role"))
    message.refuse("tool_calls", _NO_TOOLS, harmless=([],))
    message.refuse("function_call", _NO_TOOLS)
    message.refuse("audio", "this server takes texts only")
    return role, content_text(message, "content", ("text",))


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
