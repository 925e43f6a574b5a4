"""A SentencePiece model rebuilt from the vocabulary that GGUF metadata carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_keras.errors import CheckpointError

_USER_DEFINED = 4
_TYPES = range(1, 7)
_SPACE = "\u2581"


def build_sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Serialize the SentencePiece model that GGUF's `tokenizer.ggml.*` keys describe.

    Gemma's is a BPE model with byte fallback and an identity normalizer that neither adds nor
    removes spaces. A space inside a user-defined piece has to be U+2581, as it is in the text
    that SentencePiece matches the piece against.

    Raises:
        CheckpointError: the keys are missing, of unequal lengths, or describe another tokenizer.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    if metadata.get("tokenizer.ggml.model") != "llama":
        raise CheckpointError(
            f"the tokenizer is {metadata.get('tokenizer.ggml.model')!r}; Gemma's is a "
            "SentencePiece model, which GGUF calls 'llama'"
        )
    columns = [metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")]
    if not all(isinstance(column, list) for column in columns):
        raise CheckpointError("the GGUF metadata lacks the tokens, scores or types of a tokenizer")
    if len({len(column) for column in columns if column is not None}) != 1:
        raise CheckpointError("the tokenizer's tokens, scores and types have unequal lengths")

    model = proto.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    trainer.pad_id = metadata.get("tokenizer.ggml.padding_token_id", 0)
    trainer.eos_id = metadata.get("tokenizer.ggml.eos_token_id", 1)
    trainer.bos_id = metadata.get("tokenizer.ggml.bos_token_id", 2)
    trainer.unk_id = metadata.get("tokenizer.ggml.unknown_token_id", 3)
    trainer.pad_piece, trainer.eos_piece = "<pad>", "<eos>"
    trainer.bos_piece, trainer.unk_piece = "<bos>", "<unk>"
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    for index, (token, score, kind) in enumerate(zip(*columns, strict=True)):
        if kind not in _TYPES or not isinstance(token, str):
            raise CheckpointError(f"token {index} of the vocabulary has the unknown type {kind!r}")
        if index == trainer.unk_id:
            kind = model.SentencePiece.UNKNOWN
        piece = token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer.vocab_size = len(model.pieces)
    return model.SerializeToString()
