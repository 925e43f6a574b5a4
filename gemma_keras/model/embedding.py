"""Defines `ReversibleEmbedding`: KerasHub's, quantized and read in parts.

Keras names what it saves by class: with another name than KerasHub's, files of before would not
load.
"""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
from keras import ops, quantizers

from gemma_keras.model import grouped
from gemma_keras.model.chunked import variable_chunks

_CHUNK_BYTES = 32 << 20  # of a table in float32
_IN_PARTS = ("int8", "int4")


@keras.saving.register_keras_serializable(package="gemma_keras")
class ReversibleEmbedding(keras_hub.layers.ReversibleEmbedding):
    """The token embedding, and with tied weights the head.

    Keras has four float copies of a table in memory while it is quantized, and unpacks all of an
    int4 table for each lookup. Here it is quantized a chunk at a time, and rows are looked up
    packed. A quantized head rounds its inputs to 8 bits. With Keras the gradient is that of the
    largest input alone; here it passes through the rounding.
    """

    def quantize(self, mode=None, type_check=True, config=None) -> None:
        """As `ReversibleEmbedding.quantize`, to the same integers."""
        if mode not in _IN_PARTS or type_check or not self.tie_weights or self.lora_enabled:
            super().quantize(mode, type_check=type_check, config=config)
            return
        found: dict[str, list[np.ndarray]] = {}
        policy = quantized = self.dtype_policy
        for _, chunk in variable_chunks(self._embeddings, _CHUNK_BYTES):
            part = keras.layers.ReversibleEmbedding(len(chunk), self.output_dim, dtype=policy)
            part.build()
            part._embeddings.assign(chunk)
            part.quantize(mode, type_check=False, config=config)
            for name in ("_embeddings", "embeddings_scale", "embeddings_zero"):
                if getattr(part, name, None) is not None:
                    array = ops.convert_to_numpy(getattr(part, name))
                    found.setdefault(name, []).append(np.array(array))
            quantized = part.dtype_policy
        del self._embeddings
        self.quantization_config = config
        self.quantized_build((self.input_dim, self.output_dim), mode, config)
        for name, arrays in found.items():
            getattr(self, name).assign(np.concatenate(arrays))
        self.dtype_policy = quantized

    def _int8_call(self, inputs, reverse=False):
        if not reverse:
            return super()._int8_call(inputs)
        return self._logits(inputs, super()._int8_call)

    def _int4_call(self, inputs, reverse=False):
        if reverse:
            return self._logits(inputs, super()._int4_call)
        if self.lora_enabled:
            return super()._int4_call(inputs)
        ids = ops.cast(inputs, "int32")
        rows = float_rows(self, ops.reshape(ids, (-1,)))
        rows = ops.cast(rows, self.compute_dtype)
        return ops.reshape(rows, (*ops.shape(ids), self.output_dim))

    def _logits(self, inputs, call):
        """What Keras makes of inputs, and the gradient of a product with the table."""

        @ops.custom_gradient
        def logits(inputs):
            found = call(inputs, reverse=True)

            def gradients(*args, upstream=None):
                slope = ops.cast(args[0] if upstream is None else upstream, "float32")
                if self.logit_soft_cap is not None:
                    slope *= 1.0 - ops.square(ops.cast(found, "float32") / self.logit_soft_cap)
                return ops.cast(ops.matmul(slope, _float_head(self)), inputs.dtype)

            return found, gradients

        return logits(ops.cast(inputs, self.compute_dtype))


def _float_head(embedding):
    """The whole table that makes logits, float32 `(vocabulary_size, hidden_dim)`."""
    if embedding.tie_weights:
        return float_rows(embedding, ops.arange(embedding.input_dim, dtype="int32"), True)
    levels = ops.convert_to_tensor(embedding.reverse_embeddings)  # (hidden_dim, vocabulary_size)
    if embedding.quantization_mode == "int4":
        levels = quantizers.unpack_int4(levels, embedding.output_dim, axis=0)
    levels = ops.cast(levels, "float32")
    scale = ops.cast(embedding.reverse_embeddings_scale, "float32")
    zero = getattr(embedding, "reverse_embeddings_zero", None)
    if zero is None:
        return ops.transpose(levels / scale)
    return ops.transpose(grouped.values(levels, scale, zero, embedding.g_idx, axis=0))


def float_rows(embedding, ids, neighbours: bool = False):
    """Some rows of a table in int8 or int4, as floats.

    Args:
        embedding: a `ReversibleEmbedding` that Keras has quantized.
        ids: int32 `(count,)`, of a known count.
        neighbours: whether they are in order, each one more than that before.

    Returns:
        float32 `(count, hidden_dim)`.
    """

    def rows(name):
        variable = ops.convert_to_tensor(getattr(embedding, name))
        if not neighbours:
            return ops.take(variable, ids, axis=0)
        rest = tuple(variable.shape[1:])
        return ops.slice(variable, (ids[0], *(0,) * len(rest)), (ids.shape[0], *rest))

    levels = rows("_embeddings")
    if embedding.quantization_mode == "int4":
        levels = quantizers.unpack_int4(levels, embedding.output_dim, axis=-1)
    levels, scale = ops.cast(levels, "float32"), ops.cast(rows("embeddings_scale"), "float32")
    if getattr(embedding, "embeddings_zero", None) is None:
        return levels / scale[:, None]
    return grouped.values(levels, scale, rows("embeddings_zero"), embedding.g_idx, axis=1)
