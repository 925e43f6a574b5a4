"""Finds the ids of special tokens in a checkpoint's tokenizer."""

from __future__ import annotations

from typing import Any, NamedTuple

from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError


class TokenIds(NamedTuple):
    """Ids of special tokens; `stop` are those that end a text, beginning with the tokenizer's
    end-of-sequence token."""

    bos: int
    stop: tuple[int, ...]


def token_ids(checkpoint: Checkpoint) -> TokenIds:
    """Returns the special token ids of a checkpoint with a tokenizer.

    Raises:
        CheckpointError: the tokenizer lacks one of them.
    """
    pieces = processor(checkpoint)
    try:
        stop = checkpoint.stop_ids()
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not stop or pieces.bos_id() < 0 or pieces.eos_id() < 0:
        raise CheckpointError(
            "the tokenizer lacks the beginning-of-sequence or end-of-sequence token"
        )
    return TokenIds(pieces.bos_id(), stop)


def processor(checkpoint: Checkpoint) -> Any:
    """The SentencePiece processor of a checkpoint with a tokenizer.

    Raises:
        CheckpointError: it is not one.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model)
    except Exception as error:  # sentencepiece raises RuntimeError or its own, by version
        raise CheckpointError(f"tokenizer.model is not a SentencePiece model: {error}") from error
