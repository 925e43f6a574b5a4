"""Converts a SentencePiece model to the vocabulary in GGUF metadata, and back."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_keras.checkpoints.special_pieces import mark_control, mark_marks, parse_model
from gemma_keras.errors import CheckpointError
from gemma_keras.text.stream import processor

# SentencePiece and GGUF number the types of pieces alike.
_USER_DEFINED, _UNUSED, _BYTE = 4, 5, 6
_TYPES = range(1, 7)
SPACE = "\u2581"
# Holds stop ids for which GGUF has no keys.
STOP_KEY = "gemma_keras.stop_token_ids"
# SentencePiece's name of a token with a meaning, GGUF's key, Gemma's id.
_ROLES = (
    ("pad", "padding_token_id", 0),
    ("eos", "eos_token_id", 1),
    ("bos", "bos_token_id", 2),
)


def build_sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Serialize the SentencePiece model that GGUF's `tokenizer.ggml.*` keys describe.

    Gemma's is a BPE model with byte fallback and an identity normalizer that neither adds nor
    removes spaces. A space inside a user-defined piece has to be U+2581, as it is in the text
    that SentencePiece matches the piece against.

    Raises:
        CheckpointError: the keys are missing, have unequal lengths, describe another kind of
            tokenizer, or SentencePiece cannot load the result.
    """
    if metadata.get("tokenizer.ggml.model") != "llama":
        raise CheckpointError(
            f"the tokenizer is {reprlib.repr(metadata.get('tokenizer.ggml.model'))}; Gemma "
            "needs a SentencePiece model, which GGUF calls 'llama'"
        )
    tokens, scores, kinds = (_column(metadata, key) for key in ("tokens", "scores", "token_type"))
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(
            f"the tokenizer has {len(tokens):,} tokens, {len(scores):,} scores and "
            f"{len(kinds):,} types; the three numbers must be equal"
        )

    model = empty_model()
    trainer = model.trainer_spec
    trainer.byte_fallback = _BYTE in kinds
    trainer.unk_id = _token_id(metadata, "unknown_token_id", 3, len(tokens))
    for role, key, default in _ROLES:
        piece = f"<{role}>"
        # A file may call the end of a turn the end of a text: that is one of its stops.
        index = _token_id(metadata, key, default, len(tokens))
        index = tokens.index(piece) if piece in tokens else index
        setattr(trainer, f"{role}_id", index)
        setattr(trainer, f"{role}_piece", tokens[index])
    trainer.unk_piece = tokens[trainer.unk_id]
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
    mark_control(model)
    mark_marks(model, (trainer.bos_id, trainer.eos_id, trainer.pad_id, *gguf_stops(metadata)))
    return serialized(model)


def gguf_stops(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, by `tokenizer.ggml.*` keys.

    Raises:
        CheckpointError: one is not an id of the vocabulary.
    """
    num_tokens = len(metadata.get("tokenizer.ggml.tokens", []))
    found = [
        _token_id(metadata, key, 0, num_tokens)
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
        if f"tokenizer.ggml.{key}" in metadata
    ]
    more = metadata.get(STOP_KEY, [])
    if not isinstance(more, list) or not all(type(i) is int and 0 <= i < num_tokens for i in more):
        raise CheckpointError(f"{STOP_KEY} is {reprlib.repr(more)}; it must be a list of ids")
    return tuple(dict.fromkeys([*found, *more]))


def stop_metadata(stop: Sequence[int], eos: int) -> dict[str, Any]:
    """The keys that say which ids end a text beside `eos`: llama.cpp has two more, and a list of
    this project's holds what is beyond them."""
    more = [index for index in stop if index != eos]
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    found: dict[str, Any] = dict(zip(keys, more, strict=False))
    return found | ({STOP_KEY: more} if len(more) > len(keys) else {})


def empty_model() -> Any:
    """The protobuf message of a SentencePiece model as Gemma's is, without pieces."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model


def serialized(model: Any) -> bytes:
    """Returns a SentencePiece model as bytes, after SentencePiece has loaded it.

    Raises:
        CheckpointError: SentencePiece cannot load them.
    """
    return opened(model.SerializeToString())


def opened(data: bytes) -> bytes:
    """Returns the same bytes of a SentencePiece model, after SentencePiece has loaded it.

    Raises:
        CheckpointError: SentencePiece cannot load them.
    """
    try:
        processor(data)
    except Exception as error:  # RuntimeError or its own, by version
        raise CheckpointError(f"SentencePiece cannot load the tokenizer: {error}") from error
    return data


def tokenizer_metadata(model: bytes, vocabulary_size: int) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys that say a SentencePiece model: `build_sentencepiece_model` back.

    A user-defined token is written with spaces, not with U+2581, because llama.cpp matches it in
    the original text. If the embedding table has more rows than the tokenizer, as in Gemma 3 with
    images, unused tokens are added: GGUF's vocabulary size is the length of its list of tokens.

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
    parsed = parse_model(model)
    trainer, normalizer = parsed.trainer_spec, parsed.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise CheckpointError("tokenizer.model is not a BPE model, as Gemma's tokenizer is")
    if (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    ):
        raise CheckpointError(
            "tokenizer.model normalizes text before tokenizing it; Gemma's tokenizer does not"
        )
    for name in ("bos", "eos", "unk"):
        if not 0 <= getattr(trainer, f"{name}_id") < len(parsed.pieces):
            raise CheckpointError(
                f"tokenizer.model lacks the {name} token, which Gemma's tokenizer has"
            )
    return parsed


def check_fits(num_pieces: int, vocabulary_size: int) -> None:
    """Raise `CheckpointError` if the model's table lacks rows for pieces of the tokenizer."""
    if num_pieces > vocabulary_size:
        raise CheckpointError(
            f"the tokenizer has {num_pieces:,} tokens, but the model's vocabulary has "
            f"{vocabulary_size:,}"
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
            f"tokenizer.ggml.{key} is {reprlib.repr(value)}; the largest id of the "
            f"vocabulary is {vocabulary_size - 1}"
        )
    return value
