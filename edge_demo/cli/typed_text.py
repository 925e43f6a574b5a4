'''Says what a typed text means: a message, or a command such as `/help`.

A message of several lines may stand between two `"""`. A text in a block is never a command.
'''

from __future__ import annotations

import re
from typing import NamedTuple

_OPENING = re.compile(r'(/system[ \t]+)?"""', re.IGNORECASE)
# The first line that ends with the quotes ends the block.
_BLOCK = re.compile(rf'{_OPENING.pattern}(.*?)"""[ \t]*(?=\n|\Z)', re.DOTALL | re.IGNORECASE)
_COMMAND = re.compile(r"/([A-Za-z?]+)(?:\s|$)")
NOTHING = '""'  # as an argument: an empty text


class Command(NamedTuple):
    """A command that was typed instead of a message.

    Attributes:
        name: in lower case, without the slash.
        argument: what stands after it; empty if there is nothing.
    """

    name: str
    argument: str


def is_open(text: str) -> bool:
    """Whether a text begins a block of several lines that it does not end."""
    return _OPENING.match(text) is not None and _BLOCK.match(text) is None


def meaning(text: str) -> Command | str:
    """The command of a typed text, or the message that it is.

    A path, such as `/home/pi`, is a message. So is a text of several lines, except `/system` with a
    block.
    """
    block = _BLOCK.match(text)
    if block and not text[block.end() :].strip():
        inside = block[2].removeprefix("\n").removesuffix("\n")
        return Command("system", inside or NOTHING) if block[1] else inside
    if text.rstrip() in ("exit", "quit"):
        return Command(text.rstrip(), "")
    command = _COMMAND.match(text)
    if command is None or "\n" in text.strip():
        return text
    return Command(command[1].lower(), text[command.end() :].strip())
