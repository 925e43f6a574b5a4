"""A SentencePiece model as the vocabulary that GGUF metadata carries, in both directions."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from gemma_keras.errors import CheckpointError

# SentencePiece and GGUF number the types of pieces alike.
_USER_DEFINED, _UNUSED, _BYTE = 4, 5, 6
_TYPES = range(1, 7)
SPACE = "\u2581"


def build_sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Serialize the SentencePiece model that GGUF's `tokenizer.ggml.*` keys describe.

    Gemma's is a BPE model with byte fallback and an identity normalizer that neither adds nor
    removes spaces. A space inside a user-defined piece has to be U+2581, as it is in the text
    that SentencePiece matches the piece against.

    Raises:
        CheckpointError: the keys are missing, of unequal lengths, describe another tokenizer, or
            one that SentencePiece refuses.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    if metadata.get("tokenizer.ggml.model") != "llama":
        raise CheckpointError(
            f"the tokenizer is {reprlib.repr(metadata.get('tokenizer.ggml.model'))}; Gemma's is a "
            "SentencePiece model, which GGUF calls 'llama'"
        )
    tokens, scores, kinds = (_column(metadata, key) for key in ("tokens", "scores", "token_type"))
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(
            f"the tokenizer has {len(tokens):,} tokens, {len(scores):,} scores and {len(kinds):,} "
            "types; they must be equally many"
        )

    model = proto.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = _BYTE in kinds
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    trainer.pad_id = _token_id(metadata, "padding_token_id", 0, len(tokens))
    trainer.eos_id = _token_id(metadata, "eos_token_id", 1, len(tokens))
    trainer.bos_id = _token_id(metadata, "bos_token_id", 2, len(tokens))
    trainer.unk_id = _token_id(metadata, "unknown_token_id", 3, len(tokens))
    trainer.pad_piece, trainer.eos_piece = "<pad>", "<eos>"
    trainer.bos_piece, trainer.unk_piece = "<bos>", "<unk>"
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    for index, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        if kind not in _TYPES:
            raise CheckpointError(f"token {index} of the vocabulary has the unknown type {kind}")
        if not math.isfinite(score):
            raise CheckpointError(f"token {index} of the vocabulary has the score {score}")
        if index == trainer.unk_id:
            kind = model.SentencePiece.UNKNOWN
        piece = token.replace(" ", SPACE) if kind == _USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer.vocab_size = len(model.pieces)
    serialized = model.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=serialized)
    except RuntimeError as error:
        raise CheckpointError(f"SentencePiece refuses the tokenizer: {error}") from error
    return serialized


def tokenizer_metadata(model: bytes, vocabulary_size: int) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys that say a SentencePiece model: `build_sentencepiece_model` back.

    A user-defined piece is written with spaces, not with U+2581: llama.cpp looks for it in the text
    as it is. A table longer than the tokenizer, as that of Gemma 3 with images, is filled with
    unused pieces: GGUF's vocabulary is as long as its list of tokens.

    Args:
        model: the serialized SentencePiece model.
        vocabulary_size: rows of the embedding table.

    Raises:
        CheckpointError: it is not as Gemma's, or has more pieces than the table has rows.
    """
    parsed = parse_tokenizer(model)
    trainer, pieces = parsed.trainer_spec, parsed.pieces
    check_fits(len(pieces), vocabulary_size)
    padding = range(len(pieces), vocabulary_size)
    tokens = [
        piece.piece.replace(SPACE, " ") if piece.type == _USER_DEFINED else piece.piece
        for piece in pieces
    ]
    ids = {
        "bos_token_id": trainer.bos_id,
        "eos_token_id": trainer.eos_id,
        "unknown_token_id": trainer.unk_id,
        "padding_token_id": trainer.pad_id,
    }
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [*tokens, *(f"[PAD{index}]" for index in padding)],
        "scores": [*(piece.score for piece in pieces), *(-1000.0 for _ in padding)],
        "token_type": [*(piece.type for piece in pieces), *(_UNUSED for _ in padding)],
        **{key: value for key, value in ids.items() if value >= 0},
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def parse_tokenizer(model: bytes) -> Any:
    """A serialized SentencePiece model as its protobuf message, checked to be as Gemma's.

    Raises:
        CheckpointError: it is damaged, not BPE, lacks the token of a beginning, an end or the
            unknown, or changes text before it cuts it.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    try:
        parsed = proto.ModelProto.FromString(model)
    except DecodeError as error:
        raise CheckpointError(f"tokenizer.model is not a SentencePiece model: {error}") from error
    trainer, normalizer = parsed.trainer_spec, parsed.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise CheckpointError("tokenizer.model is not a BPE model, which Gemma's tokenizer is")
    if (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    ):
        raise CheckpointError("tokenizer.model changes text before it cuts it; Gemma's does not")
    for name in ("bos", "eos", "unk"):
        if not 0 <= getattr(trainer, f"{name}_id") < len(parsed.pieces):
            raise CheckpointError(f"tokenizer.model has no {name} token, which Gemma's has")
    return parsed


def check_fits(num_pieces: int, vocabulary_size: int) -> None:
    """Raise `CheckpointError` if the model's table lacks rows for pieces of the tokenizer."""
    if num_pieces > vocabulary_size:
        raise CheckpointError(
            f"the tokenizer has {num_pieces:,} pieces, the model's vocabulary {vocabulary_size:,}"
        )


_ITEMS = {"tokens": str, "scores": float, "token_type": int}


def _column(metadata: Mapping[str, Any], key: str) -> list[Any]:
    column = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(column, list) or set(map(type, column)) != {_ITEMS[key]}:
        raise CheckpointError(
            f"tokenizer.ggml.{key} must be an array of {_ITEMS[key].__name__}, found "
            f"{reprlib.repr(column)}"
        )
    return column


def _token_id(metadata: Mapping[str, Any], key: str, default: int, vocabulary_size: int) -> int:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if type(value) is not int or not 0 <= value < vocabulary_size:
        raise CheckpointError(
            f"tokenizer.ggml.{key} is {reprlib.repr(value)}; the vocabulary's ids end at "
            f"{vocabulary_size - 1}"
        )
    return value
