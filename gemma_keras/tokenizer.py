"""Gemma's SentencePiece tokenizer and the preprocessor that packs text for `fit` and `generate`."""

# Keras's operations are typed as if they returned None or a PyTree.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false
from __future__ import annotations

import keras
import keras_hub

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
