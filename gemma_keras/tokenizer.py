"""Defines Gemma's SentencePiece tokenizer and the preprocessor for `fit` and `generate`."""

from __future__ import annotations

import re
import sys
import types
import warnings
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras.checkpoints.special_pieces import (
    SPECIAL_PIECES,
    with_control_pieces,
    with_pieces_in_text,
)
from gemma_keras.model.backbone import GemmaBackbone
from gemma_keras.text.stream import encode, processor


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """Text to token ids and back, by SentencePiece.

    Text does not become a control token: `"<start_of_turn>"` in a user's words is split into
    ordinary pieces, however the file types that piece. Control tokens are added by id, as in
    `gemma_keras.text.chat`. If a text contains one, a warning is printed once.

    Args:
        proto: the serialized SentencePiece model, or the path of one.
        special_tokens_in_strings: whether control tokens in a text are parsed as such. Use it only
            for trusted text in the model's template, never for user input.
    """

    backbone_cls = GemmaBackbone

    def __init__(self, proto=None, special_tokens_in_strings: bool = False, **kwargs) -> None:
        self._in_strings = bool(special_tokens_in_strings)
        self._marks: tuple[str, ...] = ()
        self._warned = False
        self._in_text = None
        self._add_special_token("<bos>", "start_token")
        self._add_special_token("<eos>", "end_token")
        self._add_special_token("<pad>", "pad_token")
        super().__init__(proto=proto, **kwargs)

    def set_proto(self, proto) -> None:
        """Take another SentencePiece model; its special pieces become control pieces."""
        super().set_proto(proto)
        if self.proto is None:
            return
        if (model := with_control_pieces(self.proto)) is not self.proto:
            super().set_proto(model)
        unknown = self.token_to_id("<unk>")
        self._make_finder()
        self._marks = tuple(p for p in sorted(SPECIAL_PIECES) if self.token_to_id(p) != unknown)

    @property
    def special_tokens_in_strings(self) -> bool:
        """Whether control tokens in a text are parsed as such."""
        return self._in_strings

    @special_tokens_in_strings.setter
    def special_tokens_in_strings(self, value: bool) -> None:
        self._in_strings = bool(value)
        self._make_finder()

    def _make_finder(self) -> None:
        """The tokenizer that finds them; it cannot be made inside a `tf.data` pipeline."""
        self._in_text = None
        if self._in_strings and self.proto is not None:
            finder = keras_hub.tokenizers.SentencePieceTokenizer(
                proto=with_pieces_in_text(self.proto),
                sequence_length=self.sequence_length,
                add_bos=self.add_bos,
                add_eos=self.add_eos,
                dtype=self.compute_dtype,
            )
            self._in_text = types.SimpleNamespace(tokenizer=finder)  # no layer of this one

    def get_config(self):
        return super().get_config() | {"special_tokens_in_strings": self.special_tokens_in_strings}

    def tokenize(self, inputs):
        """The ids of a text or of a batch of texts."""
        if self._in_text is not None:
            return self._in_text.tokenizer.tokenize(inputs)
        if not self._warned:
            self._look_for_marks(inputs)
        return super().tokenize(inputs)

    def encode(self, text: str) -> list[int]:
        """The ids of one text as a list, the same as `tokenize` gives."""
        if self.special_tokens_in_strings:
            return encode(with_pieces_in_text(self.proto), text)
        self._tell_of_marks([text])
        return encode(self.proto, text)

    def decode(self, ids) -> str:
        """The text of the ids of one text, the same as `detokenize` gives; control tokens have
        none.

        Args:
            ids: a list, an array or a tensor of integers, of one dimension.

        Raises:
            ValueError: they are something else, such as a batch.
            IndexError: there is no token of an id.
        """
        listed = isinstance(ids, (list, tuple))
        array = np.asarray(ids if listed else ops.convert_to_numpy(ids))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                "decode takes the ids of one text, a list of integers; detokenize takes a batch"
            )
        return processor(self.proto).decode(array.astype(int).tolist())

    def _look_for_marks(self, inputs) -> None:
        """Warn about control tokens in texts, also in a `tf.data` pipeline."""
        if isinstance(inputs, (str, bytes)):
            inputs = [inputs]
        if isinstance(inputs, (list, tuple)):
            self._tell_of_marks(inputs)
        elif hasattr(inputs, "numpy") or not hasattr(inputs, "graph"):
            texts = getattr(inputs, "numpy", lambda: inputs)()
            self._tell_of_marks(np.ravel(texts).tolist())
        else:
            self._look_in_graph(inputs)

    def _look_in_graph(self, inputs) -> None:
        import tensorflow as tf

        marks = "|".join(re.escape(mark) for mark in self._marks)
        found = tf.strings.regex_full_match(inputs, f"(?s).*({marks}).*")
        first = tf.boolean_mask(tf.reshape(inputs, [-1]), tf.reshape(found, [-1]))[:1]

        def tell():
            return tf.numpy_function(self._tell_of_tensor, [first], tf.bool, stateful=True)

        tf.cond(tf.reduce_any(found), tell, lambda: False)

    def _tell_of_tensor(self, texts):
        self._tell_of_marks(texts.tolist())
        return np.True_

    def _tell_of_marks(self, texts) -> None:
        if self._warned:
            return
        for text in texts:
            text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
            mark = next((mark for mark in self._marks if mark in text), None)
            if mark is not None:
                self._warned = True
                warnings.warn(
                    f"a text holds {mark}, which is tokenized as plain text and not as the "
                    "token. If the text follows the model's template, load the model with "
                    "special_tokens_in_strings=True. chat() writes the template itself",
                    stacklevel=2,
                )
                return


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Packs text into `token_ids` and `padding_mask`, with the beginning and end tokens.

    See `keras_hub.models.CausalLMPreprocessor`. If the tokenizer parses control tokens and a text
    begins with `<bos>`, no second `<bos>` is added.
    """

    backbone_cls = GemmaBackbone
    tokenizer_cls = GemmaTokenizer

    def _call_python(self, x, y=None, sample_weight=None, sequence_length=None):
        return super()._call_python(self.without_bos(x), y, sample_weight, sequence_length)

    def _generate_preprocess_python(self, x, sequence_length=None):
        return super()._generate_preprocess_python(self.without_bos(x), sequence_length)

    def without_bos(self, x):
        """Returns texts without a `<bos>` at their beginning, if that would be the token."""
        if not (self.tokenizer.special_tokens_in_strings and self.add_start_token):
            return x
        bos = self.tokenizer.start_token
        if isinstance(x, str):
            return x.removeprefix(bos)
        if isinstance(x, bytes):
            return x.removeprefix(bos.encode())
        if isinstance(x, (list, tuple)):
            return [self.without_bos(text) for text in x]
        if isinstance(x, np.ndarray):
            return np.vectorize(self.without_bos, otypes=[object])(x)
        import tensorflow as tf

        return tf.strings.regex_replace(x, f"^{re.escape(bos)}", "", replace_global=False)

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
        rows_of_mask = np.atleast_2d(ops.convert_to_numpy(padding_mask).astype(bool))
        full = [bool(row.all()) for row in rows_of_mask]
        if not any(full):
            return
        rows: Any = self.tokenizer(self.without_bos(x))
        if len(full) == 1 and not np.ndim(x):
            rows = [rows]
        row = full.index(True)
        count = len(rows[row]) + bool(self.add_start_token)
        which = f"prompt {row} of {len(full)}" if len(full) > 1 else "the prompt"
        raise ValueError(
            f"{which} has {count:,} tokens, which leaves no room for an answer within "
            f"{length:,}; give a larger max_length, or load the model with a larger "
            "sequence_length"
        )
