"""Sums of cross-entropy in chunks of tokens, with TensorFlow.

See `gemma_keras.model.token_loss`.
"""

from __future__ import annotations

import tensorflow as tf

from gemma_keras.model.losses import Wanted


def chunked(hidden, table, targets, weights, cap, tokens: int, wanted: Wanted):
    """As `gemma_keras.model.token_loss_jax.chunked`."""
    hidden, table = tf.convert_to_tensor(hidden), tf.convert_to_tensor(table)
    # Tokens that count first, so that the others cost nothing.
    order = tf.argsort(tf.cast(tf.equal(weights, 0), tf.int32), stable=True)
    tokens = tf.minimum(tokens, tf.size(order))  # or a small vocabulary is padded to many
    missing = -tf.size(order) % tokens
    hidden = tf.pad(tf.gather(hidden, order), [[0, missing], [0, 0]])
    targets = tf.pad(tf.gather(targets, order), [[0, missing]])
    weights = tf.pad(tf.gather(weights, order), [[0, missing]])

    if not wanted.hidden:
        return _run(cap, tokens, wanted, hidden, table, targets, weights)[0]

    @tf.custom_gradient
    def sums(hidden, table):
        found, of_hidden, of_table = _run(cap, tokens, wanted, hidden, table, targets, weights)

        def gradients(scale, *_):
            table_gradient = tf.cast(of_table * scale, table.dtype) if wanted.table else None
            return tf.cast(of_hidden * scale, hidden.dtype), table_gradient

        return found, gradients

    return sums(hidden, table)


def _run(cap, tokens, wanted, hidden, table, targets, weights):
    counted = tf.math.count_nonzero(weights, dtype=tf.int32)
    wide = tf.float32 if hidden.dtype == tf.float16 else hidden.dtype
    width = hidden.shape[1]

    def chunk(index, sums, of_hidden, of_table):
        first = index * tokens
        x = tf.slice(hidden, [first, 0], [tokens, width])
        target, weight = tf.slice(targets, [first], [tokens]), tf.slice(weights, [first], [tokens])
        logits = tf.cast(tf.matmul(x, table, transpose_b=True), tf.float32)
        if cap is not None:
            logits = tf.tanh(logits / cap) * cap
        greatest = tf.reduce_max(logits, axis=-1)
        exponents = tf.exp(logits - greatest[:, None])
        mass = tf.reduce_sum(exponents, axis=-1)
        chosen = tf.gather(logits, target, batch_dims=1)
        counts = tf.not_equal(weight, 0)
        losses = tf.where(counts, tf.math.log(mass) + greatest - chosen, 0.0)
        right = tf.math.count_nonzero(counts & (chosen >= greatest), dtype=tf.float32)
        sums += tf.stack([tf.reduce_sum(losses * weight), tf.reduce_sum(losses), right])
        if not wanted.hidden:
            return index + 1, sums, of_hidden, of_table
        slope = exponents / mass[:, None] - tf.one_hot(target, tf.shape(table)[0])
        slope *= tf.where(counts, weight, 0.0)[:, None]
        if cap is not None:
            slope *= 1 - tf.square(logits / cap)
        slope = tf.cast(slope, wide)
        found = tf.cast(tf.matmul(slope, tf.cast(table, wide)), tf.float32)
        of_hidden = of_hidden.write(index, found)
        if wanted.table:
            product = tf.matmul(slope, tf.cast(x, wide), transpose_a=True)
            of_table += tf.cast(product, tf.float32)
        return index + 1, sums, of_hidden, of_table

    more = -(-counted // tokens)
    chunks = tf.shape(hidden)[0] // tokens
    nothing = tf.zeros((chunks, tokens, width))  # of chunks that are not reached
    found = tf.TensorArray(tf.float32, chunks, element_shape=(None, width)).unstack(nothing)
    start = (0, tf.zeros(3), found, tf.zeros(tf.shape(table) if wanted.table else ()))
    _, sums, found, of_table = tf.while_loop(
        lambda index, *_: index < more, chunk, start, parallel_iterations=1
    )
    # what no chunk has reached does not count
    of_hidden = tf.reshape(found.stack(), tf.shape(hidden)) if wanted.hidden else None
    return tuple(tf.unstack(sums)), of_hidden, of_table
