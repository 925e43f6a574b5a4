"""`/tokenize`, `/detokenize` and `/apply-template`, under the names of llama.cpp's server."""

from __future__ import annotations

from typing import Any

from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.messages import Turns, read_conversation
from edge_demo.server.protocol.tools import read_offer

_MOST_IDS = 10**6


def read_tokenize(value: Any) -> tuple[str, bool, bool]:
    """A text to tokenize, whether as the beginning of a text, and whether its pieces are wanted.

    Raises:
        Refusal: a field is wrong.
    """
    fields = Fields(value)
    text = fields.text("content")
    if text is None:
        raise fields.wrong("content", "text")
    return text, bool(fields.flag("add_special")), bool(fields.flag("with_pieces"))


def read_detokenize(value: Any, vocabulary_size: int) -> list[int]:
    """Token ids whose text is wanted.

    Raises:
        Refusal: a field is wrong.
    """
    fields = Fields(value)
    tokens = fields.items("tokens", _MOST_IDS)
    if tokens is None or any(type(t) is not int or not 0 <= t < vocabulary_size for t in tokens):
        raise fields.wrong("tokens", f"a list of token ids below {vocabulary_size:,}")
    return tokens


def read_apply_template(value: Any) -> tuple[str, Turns]:
    """A conversation whose prompt is wanted: system text, with that of tools, and turns.

    Raises:
        Refusal: a field is wrong.
    """
    fields = Fields(value)
    return read_conversation(fields, read_offer(fields))
