"""Computes logits from hidden states, on a CPU for one part of the vocabulary at a time."""

from __future__ import annotations

import keras
from keras import ops

_PART_BYTES = 128 << 20  # of the table in float32


def logits(embedding, hidden):
    """Computes a `ReversibleEmbedding`'s logits of hidden states.

    JAX and TensorFlow multiply 16-bit floats as float32 on a processor, and to do so copy the
    whole table, the largest weight of all. In parts they copy a part.

    Args:
        embedding: the layer, built.
        hidden: float `(..., hidden_dim)`.

    Returns:
        float `(..., vocabulary_size)`, to the bit what `embedding(hidden, reverse=True)` is.
    """
    changed = embedding.quantization_mode is not None or embedding.lora_enabled
    spread = keras.distribution.distribution() is not None  # the table is in parts already
    small = embedding.variable_dtype in ("bfloat16", "float16")
    if changed or spread or not small or not _copies():
        return embedding(hidden, reverse=True)
    # (hidden_dim, vocabulary_size), or tied (vocabulary_size, hidden_dim)
    tied = embedding.tie_weights
    table = embedding.embeddings if tied else embedding.reverse_embeddings
    hidden = ops.cast(hidden, embedding.compute_dtype)
    step = max(1, _PART_BYTES // (4 * embedding.output_dim))
    parts = []
    for first in range(0, embedding.input_dim, step):
        part = slice(first, min(first + step, embedding.input_dim))
        matrix = ops.transpose(table[part]) if tied else table[:, part]
        parts.append(ops.matmul(hidden, matrix))
    result = ops.concatenate(parts, axis=-1)
    cap = embedding.logit_soft_cap
    return result if cap is None else ops.tanh(result / cap) * cap


def _copies() -> bool:
    """Whether the backend computes on a processor and copies what it multiplies there."""
    if keras.config.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_logical_devices("GPU")
    return False
