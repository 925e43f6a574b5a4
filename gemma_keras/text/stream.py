"""Text to token ids and back by SentencePiece alone, as streams of tokens need it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import sentencepiece

from edge_demo.detokenizer import Detokenizer


@functools.lru_cache(maxsize=4)
def processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model that was serialized as `proto`."""
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def encode(proto: bytes, text: str) -> list[int]:
    """The ids of a text; none of them is a control token."""
    return processor(proto).encode(text)


def decode_stream(proto: bytes, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come; a character is given out when all its bytes are there.

    Control tokens have no text; each byte of what is no character becomes U+FFFD, as in
    SentencePiece's own decoding.
    """
    stream = Detokenizer(processor(proto))
    for token in ids:
        if text := stream.push(token):
            yield text
    if rest := stream.flush():
        yield rest
