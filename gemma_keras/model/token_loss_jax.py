"""Sums of cross-entropy in chunks of tokens, with JAX.

See `gemma_keras.model.token_loss`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gemma_keras.model.losses import Wanted


def chunked(hidden, table, targets, weights, cap, tokens: int, wanted: Wanted):
    """Computes sums of weighted losses, of losses and of right tokens.

    Args:
        hidden: float `(count, hidden_dim)`.
        table: `(vocabulary_size, hidden_dim)`, of the same dtype.
        targets: int32 `(count,)`.
        weights: float32 `(count,)`.
        cap: soft cap of the logits, or `None`.
        tokens: of a chunk.
        wanted: which gradients.

    Returns:
        Three float32 scalars. The first has gradients of `hidden` and `table`.
    """
    tokens = min(tokens, hidden.shape[0])
    # Tokens that count first, so that the others cost nothing.
    order = jnp.argsort(weights == 0, stable=True)
    missing = -len(order) % tokens
    hidden = jnp.pad(hidden[order], ((0, missing), (0, 0)))
    targets, weights = (jnp.pad(a[order], (0, missing)) for a in (targets, weights))
    return _sums(cap, tokens, wanted, hidden, table, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(cap, tokens, wanted, hidden, table, targets, weights):
    return _run(cap, tokens, Wanted(False, False), hidden, table, targets, weights)[0]


def _forward(cap, tokens, wanted, hidden, table, targets, weights):
    sums, gradients = _run(cap, tokens, wanted, hidden, table, targets, weights)
    return sums, (*gradients, jnp.zeros((), hidden.dtype))


def _backward(cap, tokens, wanted, kept, cotangents):
    of_hidden, of_table, like = kept
    scale = cotangents[0]
    of_hidden = (of_hidden * scale).astype(like.dtype) if wanted.hidden else None
    of_table = (of_table * scale).astype(like.dtype) if wanted.table else None
    return of_hidden, of_table, None, None


_sums.defvjp(_forward, _backward)


def _run(cap, tokens, wanted, hidden, table, targets, weights):
    """The sums, and float32 gradients of the first as for `hidden` and `table`."""
    counted = jnp.sum(weights != 0)
    wide = jnp.float32 if hidden.dtype == jnp.float16 else hidden.dtype

    def product(a, b, over):
        dimensions = (over, ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    def chunk(state):
        index, sums, of_hidden, of_table = state
        first = index * tokens

        def part(array):
            return jax.lax.dynamic_slice_in_dim(array, first, tokens)

        x, target, weight = part(hidden), part(targets), part(weights)
        logits = product(x, table, ((1,), (1,)))
        if cap is not None:
            logits = jnp.tanh(logits / cap) * cap
        greatest = jnp.max(logits, axis=-1)
        exponents = jnp.exp(logits - greatest[:, None])
        mass = jnp.sum(exponents, axis=-1)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        counts = weight != 0
        losses = jnp.where(counts, jnp.log(mass) + greatest - chosen, 0.0)
        right = jnp.sum(jnp.where(counts, chosen >= greatest, False))
        added = (jnp.sum(losses * weight), jnp.sum(losses), right.astype(jnp.float32))
        sums = tuple(a + b for a, b in zip(sums, added, strict=True))
        if wanted.hidden:
            share = jnp.where(counts, weight, 0.0)[:, None]
            is_target = jnp.arange(table.shape[0])[None] == target[:, None]
            slope = (exponents / mass[:, None] - is_target) * share
            if cap is not None:
                slope = slope * (1 - jnp.square(logits / cap))
            slope = slope.astype(wide)
            found = product(slope, table.astype(wide), ((1,), (0,)))
            of_hidden = jax.lax.dynamic_update_slice_in_dim(of_hidden, found, first, 0)
            if wanted.table:
                of_table = of_table + product(slope, x.astype(wide), ((0,), (0,)))
        return index + 1, sums, of_hidden, of_table

    zero = jnp.zeros((), jnp.float32)
    start = (
        0,
        (zero, zero, zero),
        jnp.zeros(hidden.shape if wanted.hidden else (), jnp.float32),
        jnp.zeros(table.shape if wanted.table else (), jnp.float32),
    )
    more = -(-counted // tokens)
    _, sums, of_hidden, of_table = jax.lax.while_loop(lambda s: s[0] < more, chunk, start)
    return sums, (of_hidden, of_table)
