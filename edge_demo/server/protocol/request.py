"""What routes make of a request: prompts, and how they are to be answered."""

from __future__ import annotations

import dataclasses

from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.messages import Turns
from edge_demo.server.protocol.settings import Settings
from edge_demo.tool_calls.tool import Offer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text or a conversation, or tokens.

    Attributes:
        text: to continue, where there is nothing else.
        turns: of a conversation to answer.
        system: text before the turns.
        ids: of tokens to continue.
    """

    text: str = ""
    turns: Turns = ()
    system: str = ""
    ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """A request for answers.

    Attributes:
        model: that is asked for; `None` for the only one.
        prompts: at least one; only a list of texts to complete has more.
        settings: of each answer.
        stream: whether it is sent as it comes.
        usage: whether a stream ends with the numbers of tokens.
        unknown: how many of its fields nobody knows.
        offer: of tools that the answers may call.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    settings: Settings
    stream: bool
    usage: bool
    unknown: int
    offer: Offer | None = None


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Whether an answer is streamed, and whether with usage.

    Raises:
        Refusal: a field has another type.
    """
    stream = bool(fields.flag("stream"))
    options = fields.inner("stream_options")
    usage = False
    if options is not None:
        usage = bool(options.flag("include_usage"))
    return stream, usage
