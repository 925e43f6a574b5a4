"""Reads `messages`, a conversation in the format of OpenAI's API and Hugging Face chat
templates."""

from __future__ import annotations

from typing import Any

from edge_demo.errors import RequestError, brief

Turns = tuple[tuple[str, str], ...]

_SPEAKERS = {"user": "user", "assistant": "model", "model": "model"}


def read_messages(value: Any) -> tuple[str, Turns]:
    """A conversation that waits for the model's answer.

    Args:
        value: a list of `{"role": ROLE, "content": TEXT}`: optionally one of the role `system`,
            then `user` and `assistant` (or `model`, Gemma's own word) in turn, with a `user` last.

    Returns:
        The system text, which may be empty, and the turns as `Tokenizer.encode_chat` takes them.

    Raises:
        RequestError: it has another form.
    """
    if not isinstance(value, list) or not value:
        raise RequestError('"messages" must be a list of {"role": ROLE, "content": TEXT}')
    for number, message in enumerate(value, start=1):
        _check(message, number)
    system = ""
    if value[0]["role"] == "system":
        system, value = value[0]["content"], value[1:]
    turns = []
    for message in value:
        speaker = _SPEAKERS.get(message["role"])
        expected = "model" if len(turns) % 2 else "user"
        if speaker != expected:
            raise RequestError(
                'the roles of "messages" must be user and assistant in turn, after at most '
                f"one system; found {brief(message['role'], 40)!r} instead of "
                f"{_role(expected)}"
            )
        turns.append((speaker, message["content"]))
    if len(turns) % 2 == 0:
        raise RequestError('the last of "messages" must have the role user')
    return system, tuple(turns)


def _role(speaker: str) -> str:
    return "user" if speaker == "user" else "assistant"


def _check(message: Any, number: int) -> None:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise RequestError(f'message {number:,} must have exactly the keys "role" and "content"')
    for key, content in message.items():
        if not isinstance(content, str):
            raise RequestError(
                f'the "{key}" of message {number:,} must be text, not {brief(content, 40)}'
            )
    if message["role"] not in ("system", *_SPEAKERS):
        raise RequestError(
            f"the role of message {number:,} must be system, user or assistant, not "
            f"{brief(message['role'], 40)!r}"
        )
