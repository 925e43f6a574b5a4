"""`/v1/embeddings`: vectors of texts.

After OpenAI's API reference, "Embeddings". `prompt_name` and `truncate` are fields of this server;
Hugging Face's text-embeddings-inference has them too.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import numpy as np

from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields

MOST_INPUTS = 2048  # OpenAI's
MOST_TOKENS = 300_000  # of all inputs together, OpenAI's
_MOST_IDS = 10**6
_MOST_DIMENSIONS = 1 << 16
_LONGEST_NAME = 256


@dataclasses.dataclass(frozen=True)
class EmbeddingsRequest:
    """A request for vectors.

    Attributes:
        model: that is asked for; `None` for the only one.
        texts: to embed; empty if `ids` are given.
        ids: token ids of texts to embed; empty if `texts` are given.
        dimensions: of a vector; `None` for all.
        as_base64: whether a vector is sent as base64 of its little-endian float32 numbers.
        prompt_name: what the texts are for; `None` for the model's default.
        truncate: whether the end of a text that is too long is left out.
        unknown: how many of its fields nobody knows.
    """

    model: str | None
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    dimensions: int | None
    as_base64: bool
    prompt_name: str | None
    truncate: bool
    unknown: int


def read_embeddings(value: Any, vocabulary_size: int) -> EmbeddingsRequest:
    """A request for vectors.

    Args:
        value: the request's JSON.
        vocabulary_size: of the model.

    Raises:
        Refusal: a field is wrong.
    """
    fields = Fields(value)
    fields.ignore(("user",))
    texts, ids = _inputs(fields, vocabulary_size)
    encoding = fields.choice("encoding_format", ("float", "base64"))
    prompt_name = fields.text("prompt_name", _LONGEST_NAME)
    if prompt_name is not None and ids:
        raise Refusal(
            "prompt_name puts text before texts; the input has token ids",
            code="unsupported",
            param="prompt_name",
        )
    return EmbeddingsRequest(
        model=fields.text("model"),
        texts=texts,
        ids=ids,
        dimensions=fields.whole("dimensions", 1, _MOST_DIMENSIONS),
        as_base64=encoding == "base64",
        prompt_name=prompt_name,
        truncate=bool(fields.flag("truncate")),
        unknown=fields.unknown,
    )


def _inputs(
    fields: Fields, vocabulary_size: int
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Texts or lists of token ids, one of both."""
    value = fields.any("input")
    items: Any = [value] if isinstance(value, str) else fields.items("input", _MOST_IDS)
    what = "text, a list of texts, token ids, or a list of such lists, none of them empty"
    if not items:
        raise fields.wrong("input", what)
    if all(type(item) is int for item in items):
        items = [items]
    if len(items) > MOST_INPUTS:
        raise Refusal(
            f"input has {len(items):,} items; the limit is {MOST_INPUTS:,}", param="input"
        )
    if all(isinstance(item, str) and item for item in items):
        return tuple(items), ()
    if not all(isinstance(item, list) and item for item in items):
        raise fields.wrong("input", what)
    for ids in items:
        if any(type(token) is not int or not 0 <= token < vocabulary_size for token in ids):
            raise Refusal(
                f"token ids of input must be whole numbers below {vocabulary_size:,}", param="input"
            )
    return (), tuple(map(tuple, items))


def embeddings_body(
    model: str, vectors: np.ndarray, tokens: int, as_base64: bool
) -> dict[str, Any]:
    """The object that is sent.

    Args:
        model: its name.
        vectors: float32 `(inputs, dimensions)`.
        tokens: of all inputs, prompts included.
        as_base64: as of `EmbeddingsRequest`.
    """
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if as_base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
