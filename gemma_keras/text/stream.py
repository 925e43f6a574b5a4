"""Text to token ids and back by SentencePiece alone, as streams of tokens need it."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Iterator

import sentencepiece

_SPACE = "\u2581"
_UNKNOWN = "\u2047"  # as SentencePiece decodes it, less the spaces around it


def _one_mark_a_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("gemma_keras.one_mark_a_byte", _one_mark_a_byte)


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
    model = processor(proto)
    decoder = codecs.getincrementaldecoder("utf-8")("gemma_keras.one_mark_a_byte")
    for token in ids:
        if model.is_control(token):
            continue
        if model.is_byte(token):
            text = decoder.decode(bytes([int(model.id_to_piece(token)[1:-1], 16)]))
        else:
            piece = _UNKNOWN if model.is_unknown(token) else model.id_to_piece(token)
            text = decoder.decode(b"", final=True) + piece.replace(_SPACE, " ")
            decoder.reset()
        if text:
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
