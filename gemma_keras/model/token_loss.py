"""Cross-entropy of the next token, in nats, without the logits of all tokens at once.

The logits of one row of 2,048 tokens over 262,144 pieces take 2 GB in float32, and as much again
for their gradient. Here they are made for a chunk of tokens at a time. Tokens that do not count
are left out before the product with the table.
"""

from __future__ import annotations

import keras
from keras import ops

from gemma_keras.model.by_chunks import summed
from gemma_keras.model.losses import Sums, Wanted, sums_of_logits
from gemma_keras.model.token_loss_quantized import chunked as of_parts

_CHUNK_BYTES = 128 << 20  # of a chunk's logits in float32
_PART_BYTES = 32 << 20  # of all tokens' logits of a part of the vocabulary
_ROWS, _LENGTH = 4, 1024  # where a batch's size is not known


def token_sums(
    embedding, hidden, targets, weights, training: bool = True, chunk_bytes: int | None = None
) -> Sums:
    """The sums of hidden states, with the logits of one chunk of tokens in memory.

    Where the table is a plain matrix the gradients are made with the value, so that no logit is
    computed twice; products in 16 bits are added up in float32. Of a table in int8 or int4 one
    part after another is made float. A table that is spread over devices, or has an adapter, is
    left to its layer, which computes each chunk again for the gradients.

    Args:
        embedding: a built `ReversibleEmbedding`, tied or not, with or without a soft cap.
        hidden: float `(batch, length, hidden_dim)`, normed.
        targets: int `(batch, length)`.
        weights: float `(batch, length)`.
        training: whether gradients are wanted.
        chunk_bytes: the most bytes of a chunk's logits in float32, but at least a token's; by
            default 128 MiB. Of a quantized table those of a part, by default 32 MiB.
    """
    weights = ops.cast(weights, "float32")
    tokens = tokens_of_chunk(embedding, chunk_bytes)
    spread = keras.distribution.distribution() is not None
    if spread or (embedding.quantization_mode is not None and not _in_parts(embedding)):
        return _by_layer(embedding, hidden, targets, weights, tokens)
    count = (hidden.shape[0] or _ROWS) * (hidden.shape[1] or _LENGTH)
    hidden = ops.reshape(ops.cast(hidden, embedding.compute_dtype), (-1, embedding.output_dim))
    targets, weights = ops.reshape(ops.cast(targets, "int32"), (-1,)), ops.reshape(weights, (-1,))
    counted = ops.sum(ops.cast(ops.not_equal(weights, 0), "float32"))
    if embedding.quantization_mode is not None:
        part = (chunk_bytes or _PART_BYTES) // (4 * max(count, embedding.output_dim))
        wanted = Wanted(training, False)
        sums = of_parts(embedding, hidden, targets, weights, max(1, part), wanted)
        return Sums(*sums, counted)
    table = embedding.embeddings
    if not embedding.tie_weights:
        table = ops.transpose(embedding.reverse_embeddings)
    table = ops.cast(table, embedding.compute_dtype)  # (vocabulary_size, hidden_dim)
    wanted = Wanted(training, training and bool(embedding.trainable_variables))
    weighted, total, correct = _of_backend()(
        hidden, table, targets, weights, embedding.logit_soft_cap, tokens, wanted
    )
    return Sums(weighted, total, correct, counted)


def _in_parts(embedding) -> bool:
    """Whether the parts of a quantized table can be made float alone."""
    known = embedding.quantization_mode in ("int8", "int4")
    return known and embedding.tie_weights and not embedding.lora_enabled


def tokens_of_chunk(embedding, chunk_bytes: int | None = None) -> int:
    """How many tokens' logits are made at a time; arguments as of `token_sums`."""
    return max(1, (chunk_bytes or _CHUNK_BYTES) // (4 * embedding.input_dim))


def bytes_at_once(embedding, tokens: int) -> int:
    """Bytes of the logits, in float32, that a step of so many tokens has at once."""
    if _in_parts(embedding):
        return min(4 * tokens * embedding.input_dim, _PART_BYTES)
    return 4 * min(tokens, tokens_of_chunk(embedding)) * embedding.input_dim


def _of_backend():
    backend = keras.config.backend()
    if backend == "jax":
        from gemma_keras.model.token_loss_jax import chunked
    elif backend == "tensorflow":
        from gemma_keras.model.token_loss_tensorflow import chunked
    else:
        from gemma_keras.model.token_loss_torch import chunked
    return chunked


def _by_layer(embedding, hidden, targets, weights, tokens: int) -> Sums:
    """Chunks of each row's tokens, so that rows stay on their devices."""

    def sums(hidden, targets, weights):
        return sums_of_logits(embedding(hidden, reverse=True), targets, weights)

    arrays = hidden, targets, weights
    return sums(*arrays) if hidden.shape[1] is None else Sums(*summed(sums, arrays, tokens))
