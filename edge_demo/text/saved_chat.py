"""Conversations as files: `{"messages": [...]}`, in the format of OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_demo.durable import write_whole
from edge_demo.errors import RequestError, brief, sentence
from edge_demo.text.messages import Turns, read_messages

_LARGEST = 16 << 20  # bytes


def write_chat(path: Path, system: str, turns: Sequence[tuple[str, str]]) -> None:
    """Write a conversation to a file that only its owner may read.

    Args:
        path: of the file; a conversation that is there is replaced.
        system: the system text; empty if there is none.
        turns: `("user" or "model", text)`, oldest first.

    Raises:
        RequestError: the file cannot be written, or is something else than a conversation. What was
            there is there still.
    """
    if os.path.lexists(path):
        try:
            read_chat(path)
        except RequestError:
            raise RequestError(
                f"{brief(path)} exists and is not a saved conversation; choose another name"
            ) from None
    messages = [{"role": "system", "content": system}] if system else []
    for speaker, text in turns:
        messages.append({"role": "user" if speaker == "user" else "assistant", "content": text})
    text = json.dumps({"messages": messages}, ensure_ascii=False, indent=1)
    try:
        write_whole(path, [text.encode("utf-8", "replace"), b"\n"])
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL character
        raise RequestError(f"the conversation cannot be written: {sentence(error)}") from error


def read_chat(path: Path) -> tuple[str, Turns]:
    """Read a conversation.

    Args:
        path: of the file.

    Returns:
        The system text, which may be empty, and the turns. The last one may be the user's or the
        model's.

    Raises:
        RequestError: the file cannot be read, or is not a conversation.
    """
    value = _read_json(path)
    if not isinstance(value, dict) or set(value) != {"messages"}:
        raise RequestError(f'{brief(path)} is not a conversation; it must be {{"messages": [...]}}')
    messages = value["messages"]
    try:
        if _ends_with_an_answer(messages):
            # `read_messages` wants a message that waits for an answer.
            system, turns = read_messages([*messages, {"role": "user", "content": ""}])
            return system, turns[:-1]
        return read_messages(messages)
    except RequestError as error:
        raise RequestError(f"{brief(path)}: {error}") from None


def _ends_with_an_answer(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") in ("assistant", "model")


def _read_json(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise RequestError(f"{brief(path)} is not a regular file")
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL character
        raise RequestError(f"the conversation cannot be read: {sentence(error)}") from error
    if len(data) > _LARGEST:
        raise RequestError(f"{brief(path)} is larger than {_LARGEST:,} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{brief(path)} is not JSON: {brief(error)}") from None
