"""Gemma's SentencePiece tokenizer and the preprocessor that packs text for `fit` and `generate`."""

# Keras's operations are typed as if they returned None or a PyTree.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false
from __future__ import annotations

import sys

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras.backbone import GemmaBackbone


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """Text to token ids and back, by SentencePiece.

    Text never becomes a control token: `"<start_of_turn>"` in a user's words is split into
    ordinary pieces. Control tokens are put in by id, as `gemma_keras.chat` does.

    Args:
        proto: the serialized SentencePiece model, or the path of one.
    """

    backbone_cls = GemmaBackbone

    def __init__(self, proto=None, **kwargs) -> None:
        self._add_special_token("<bos>", "start_token")
        self._add_special_token("<eos>", "end_token")
        self._add_special_token("<pad>", "pad_token")
        super().__init__(proto=proto, **kwargs)


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Packs text into `token_ids` and `padding_mask`, with the beginning and end tokens.

    See `keras_hub.models.CausalLMPreprocessor`.
    """

    backbone_cls = GemmaBackbone
    tokenizer_cls = GemmaTokenizer

    def generate_preprocess(self, x, sequence_length=None):
        """Pack prompts, without the end token.

        Raises:
            ValueError: a prompt leaves no room for a continuation.
        """
        length = self.sequence_length if sequence_length is None else sequence_length
        packed = super().generate_preprocess(x, length)
        tensorflow = sys.modules.get("tensorflow")
        if tensorflow is None or not tensorflow.inside_function():
            self._require_room(x, packed["padding_mask"], length)
        return packed

    def _require_room(self, x, padding_mask, length: int) -> None:
        full = np.atleast_2d(ops.convert_to_numpy(padding_mask).astype(bool)).all(axis=1)
        if not full.any():
            return
        found = self.tokenizer(x)
        rows = found if len(full) > 1 or np.ndim(x) else [found]
        row = int(full.argmax())
        count = len(rows[row]) + bool(self.add_start_token)
        which = f"prompt {row} of {len(full)}" if len(full) > 1 else "the prompt"
        raise ValueError(
            f"{which} has {count:,} tokens, which leaves no room for a continuation in "
            f"{length:,}; give a greater max_length, or load the model with a greater "
            "sequence_length"
        )
