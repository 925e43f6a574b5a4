"""Sums of cross-entropy over a quantized table, for one part of the vocabulary at a time.

The table stays in integers. A part of it is made float and multiplied with all tokens. So neither
the float table nor the logits of all tokens are in memory.

One pass makes the sums and their gradient. Where a part has a greater logit, what was added before
is scaled, as in FlashAttention (Dao et al., 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import keras
from keras import ops

from gemma_keras.model.embedding import float_rows
from gemma_keras.model.losses import Wanted

_LEAST = -1e30  # below any logit


def chunked(embedding, hidden, targets, weights, rows: int, wanted: Wanted):
    """As `gemma_keras.model.token_loss_jax.chunked`, of a layer in place of its table.

    Keras rounds what a quantized head multiplies to 8 bits, and so does this. Gradients pass
    through the rounding.

    Args:
        embedding: a tied `ReversibleEmbedding` in int8 or int4.
        hidden: float `(count, hidden_dim)`.
        targets: int32 `(count,)`.
        weights: float32 `(count,)`.
        rows: of a part of the table.
        wanted: which gradients; there are none of the table.

    Returns:
        Three float32 scalars. The first has gradients of `hidden`.
    """
    size, cap = embedding.input_dim, embedding.logit_soft_cap
    rows = min(rows, size)

    def part(index):
        """Some of the table's rows, and which of the vocabulary they are."""
        first = ops.minimum(index * rows, size - rows)  # the last part begins earlier
        ids = first + ops.arange(rows, dtype="int32")
        return float_rows(embedding, ids, neighbours=True), first, ids >= index * rows

    def slope_of_cap(logits):
        return ops.ones_like(logits) if cap is None else 1.0 - ops.square(logits / cap)

    def add(index, state, x):
        greatest, mass, chosen, of_hidden = state
        table, first, new = part(index)
        logits = ops.matmul(x, ops.transpose(table))
        if cap is not None:
            logits = ops.tanh(logits / cap) * cap
        logits = ops.where(new, logits, _LEAST)
        now = ops.maximum(greatest, ops.max(logits, axis=-1))
        shrunk = ops.exp(greatest - now)
        exponents = ops.exp(logits - now[:, None])
        mass = mass * shrunk + ops.sum(exponents, axis=-1)
        place = ops.clip(targets - first, 0, rows - 1)
        found = ops.take_along_axis(logits, place[:, None], axis=-1)[:, 0]
        here = ops.logical_and(targets >= index * rows, targets < first + rows)
        chosen = ops.where(here, found, chosen)
        if wanted.hidden:
            if cap is not None:
                exponents = ops.where(new, exponents * slope_of_cap(logits), 0.0)
            of_hidden = of_hidden * shrunk[:, None] + ops.matmul(exponents, table)
        return now, mass, chosen, of_hidden

    @ops.custom_gradient
    def sums(hidden):
        x = _rounded(embedding, ops.cast(hidden, "float32"))
        none = ops.zeros_like(weights)
        start = (none + _LEAST, none, none, ops.zeros_like(x) if wanted.hidden else none)
        state = _loop(-(-size // rows), lambda index, state: add(index, state, x), start)
        greatest, mass, chosen, of_hidden = state
        counts = ops.not_equal(weights, 0)
        losses = ops.where(counts, ops.log(mass) + greatest - chosen, 0.0)
        right = ops.sum(ops.cast(ops.logical_and(counts, chosen >= greatest), "float32"))
        if wanted.hidden:
            # a token's gradient: what all rows pull, less its target's
            target = float_rows(embedding, targets) * slope_of_cap(chosen)[:, None]
            share = ops.where(counts, weights, 0.0)[:, None]
            of_hidden = ops.where(
                counts[:, None], (of_hidden / mass[:, None] - target) * share, 0.0
            )

        def gradients(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            return ops.cast(of_hidden * upstream[0], hidden.dtype)

        return ops.stack([ops.sum(losses * weights), ops.sum(losses), right]), gradients

    weighted, total, correct = ops.unstack(sums(hidden))
    return weighted, ops.stop_gradient(total), ops.stop_gradient(correct)


def _rounded(embedding, x):
    """What Keras's quantized head multiplies."""
    if not embedding.inputs_quantizer:
        return x
    levels, scale = embedding.inputs_quantizer(x)
    return ops.cast(levels, x.dtype) / scale


def _loop(count: int, body, state):
    """One part after another; TensorFlow would begin ten at once."""
    if keras.config.backend() != "tensorflow":
        return ops.fori_loop(0, count, body, state)
    import tensorflow as tf

    _, state = tf.while_loop(
        lambda index, _: index < count,
        lambda index, state: (index + 1, body(index, state)),
        (0, state),
        parallel_iterations=1,
    )
    return state
