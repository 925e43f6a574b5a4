"""Token ids to text, as they come, without ever splitting a character."""

from __future__ import annotations

import codecs
from typing import Any

_SPACE = "\u2581"
_UNKNOWN = "\u2047"  # as SentencePiece decodes it, less the spaces around it


def _one_mark_a_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for every byte that is no UTF-8, as SentencePiece decodes them."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("edge_demo.one_mark_a_byte", _one_mark_a_byte)


def piece_of(model: Any, token: int) -> str | bytes:
    """The text of one token: its byte for a byte piece, `""` for a control token and for an id
    without a piece.

    Args:
        model: a `sentencepiece.SentencePieceProcessor`.
        token: the id.
    """
    if token >= model.vocab_size() or model.is_control(token) or model.is_unused(token):
        return ""
    if model.is_byte(token):
        return bytes([int(model.id_to_piece(token)[1:-1], 16)])
    if model.is_unknown(token):
        return _UNKNOWN
    return model.id_to_piece(token).replace(_SPACE, " ")


class Detokenizer:
    """Turns ids into text as they come; a character is given out when all its bytes are there.

    Args:
        model: a `sentencepiece.SentencePieceProcessor`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder = codecs.getincrementaldecoder("utf-8")("edge_demo.one_mark_a_byte")

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        piece = piece_of(self._model, token)
        if isinstance(piece, bytes):
            return self._decoder.decode(piece)
        return self.flush() + piece

    def flush(self) -> str:
        """What is left when no more comes: U+FFFD for each byte of an unfinished character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
