"""Makes special tokens control tokens, so that plain text cannot produce them.

Files mark the tokens of turns and of a text's beginning and end differently. They may be control
tokens, user-defined tokens (which SentencePiece matches in a text) or ordinary tokens. Here they
become control tokens, so that user text never opens or closes a turn. They can only be added by id.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from gemma_keras.errors import CheckpointError
from gemma_keras.text.chat import TURN_TEMPLATES

TURN_PIECES = frozenset(
    piece for turns in TURN_TEMPLATES for piece in (turns.start_of_turn, turns.end_of_turn)
)
SPECIAL_PIECES = TURN_PIECES | {"<bos>", "<eos>", "<pad>"}
_MAX_BYTES = 64 << 20


def parse_model(model: bytes, what: str = "tokenizer.model") -> Any:
    """A serialized SentencePiece model as its protobuf message.

    Raises:
        CheckpointError: it is not valid.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    if len(model) > _MAX_BYTES:
        raise CheckpointError(
            f"{what} has {len(model):,} bytes, which is too large for a tokenizer"
        )
    try:
        parsed = proto.ModelProto.FromString(model)
    except DecodeError as error:
        raise CheckpointError(f"{what} is not a SentencePiece model: {error}") from error
    if not parsed.pieces:
        raise CheckpointError(f"{what} is not a SentencePiece model: it has no tokens")
    return parsed


@functools.lru_cache(maxsize=4)
def with_control_pieces(model: bytes) -> bytes:
    """A serialized SentencePiece model whose special pieces are control pieces.

    If they already are, the model is returned unchanged.

    Raises:
        CheckpointError: it is not a SentencePiece model.
    """
    parsed = parse_model(model)
    return parsed.SerializeToString() if mark_control(parsed) else model


def mark_control(parsed: Any, ids: Iterable[int] = ()) -> bool:
    """Make the special pieces of a parsed model, and those of `ids`, control pieces.

    Returns:
        Returns whether one of them was not a control piece before.
    """
    kinds = parsed.SentencePiece
    kept = (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
    wanted = [p for p in parsed.pieces if p.piece in SPECIAL_PIECES]
    wanted += [parsed.pieces[index] for index in ids]
    changed = [piece for piece in wanted if piece.type not in kept]
    for piece in changed:
        piece.type = kinds.CONTROL
    return bool(changed)


@functools.lru_cache(maxsize=4)
def with_pieces_in_text(model: bytes) -> bytes:
    """Returns a serialized SentencePiece model that matches its control tokens in a text."""
    parsed = parse_model(model)
    kinds = parsed.SentencePiece
    for piece in parsed.pieces:
        if piece.type == kinds.CONTROL:
            piece.type = kinds.USER_DEFINED
    return parsed.SerializeToString()


@functools.lru_cache(maxsize=4)
def is_usable(model: bytes) -> tuple[bool, ...]:
    """For each piece, whether a model may say it: all but those that are unused."""
    parsed = parse_model(model)
    return tuple(piece.type != parsed.SentencePiece.UNUSED for piece in parsed.pieces)


def mark_marks(parsed: Any, ids: Iterable[int]) -> None:
    """Make those of `ids` control pieces that are written as a mark, `<...>`.

    A stop may also be an ordinary piece, such as a newline, and then stays one.
    """
    texts = {index: parsed.pieces[index].piece for index in ids}
    mark_control(parsed, [i for i, text in texts.items() if text[:1] == "<" and text[-1:] == ">"])
