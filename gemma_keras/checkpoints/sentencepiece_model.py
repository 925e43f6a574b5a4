"""A SentencePiece model rebuilt from the vocabulary that GGUF metadata carries."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from gemma_keras.errors import CheckpointError

_USER_DEFINED, _BYTE = 4, 6
_TYPES = range(1, 7)
_SPACE = "\u2581"


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
        piece = token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer.vocab_size = len(model.pieces)
    serialized = model.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=serialized)
    except RuntimeError as error:
        raise CheckpointError(f"SentencePiece refuses the tokenizer: {error}") from error
    return serialized


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
