"""What a model may call, and what it has called."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: of letters, digits, `_` and `-`.
        description: for the model; it may be empty.
        parameters: the JSON schema of an object, its arguments.
    """

    name: str
    description: str
    parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Offer:
    """The tools of one answer.

    Attributes:
        tools: at least one.
        allowed: those of them that this answer may call, at least one.
        required: whether the answer must be a call.
        several: whether it may be more than one call.
    """

    tools: tuple[Tool, ...]
    allowed: tuple[Tool, ...]
    required: bool
    several: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: of the tool.
        arguments: JSON of an object.
    """

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call returned.

    Attributes:
        name: of the tool.
        content: JSON or text.
    """

    name: str
    content: str
