"""The key-value cache of the Keras model.

A layer's cache is a pair of arrays `(batch, kv_heads, total, head_dim)`. In a global layer, or if
`total` is more than the window, position `p` is in slot `p`. A sliding-window layer needs only as
many slots as its window. Then position `p` is in slot `p % total`, and a token overwrites the one
that has just left the window.
"""

from __future__ import annotations

import keras
from keras import ops


def write(cache, key, value, start, sliding_window: int | None):
    """Put the keys and values of new tokens into a cache.

    With PyTorch, outside of training, the cache is changed in place.

    Args:
        cache: a pair `(batch, kv_heads, total, head_dim)`.
        key: `(batch, kv_heads, length, head_dim)`; a length over 1 must not go round the cache.
        value: like `key`.
        start: position of the first of them: int `()`, or `(batch,)` where rows differ.
        sliding_window: of the layer.

    Returns:
        The keys, the values, and the position of each slot, int `(total,)` or `(batch, total)`;
        below 0 where a window's slot holds nothing yet.
    """
    total, length = cache[0].shape[2], key.shape[2]
    positions = ops.arange(ops.shape(cache[0])[2], dtype="int32")
    slot = start
    if sliding_window is not None and total is not None and total <= sliding_window:
        last = ops.expand_dims(start + (length - 1), -1)
        positions = last - ops.mod(last - positions, total)
        if length == 1:
            slot = ops.mod(start, total)
    return _write_at(cache[0], key, slot), _write_at(cache[1], value, slot), positions


def _write_at(cache, new, slot):
    new = ops.cast(new, cache.dtype)
    shape = ops.shape(new)[:3]
    in_place = keras.config.backend() == "torch" and not _records_gradients()
    if in_place:
        cache = cache.contiguous()  # beams begin as one row seen several times
    if len(slot.shape) == 0 and not in_place:
        return ops.slice_update(cache, (0, 0, slot, 0), new)
    if len(slot.shape) == 0:
        return cache.index_copy_(2, ops.cast(slot + ops.arange(shape[2]), "int64"), new)
    rows, heads, places = (ops.arange(size, dtype="int32") for size in shape)
    where = (
        ops.reshape(rows, (-1, 1, 1)),
        ops.reshape(heads, (1, -1, 1)),
        ops.reshape(slot, (-1, 1, 1)) + places,
    )
    if in_place:
        return cache.index_put_(where, new)
    indices = ops.stack([ops.broadcast_to(index, shape) for index in where], axis=-1)
    return ops.scatter_update(
        cache, ops.reshape(indices, (-1, 3)), ops.reshape(new, (-1, new.shape[-1]))
    )


def _records_gradients() -> bool:
    import torch

    return torch.is_grad_enabled()


def place(array, lengths, sliding_window: int | None, capacity: int):
    """The keys or values of whole prompts as a cache.

    Args:
        array: `(batch, kv_heads, length, head_dim)`, of prompts that begin at position 0.
        lengths: number of tokens of each prompt, int `(batch,)`; the rest is padding.
        sliding_window: of the layer.
        capacity: tokens that the text may come to, at least `length`.

    Returns:
        `(batch, kv_heads, total, head_dim)`, with the smallest `total` that `sliding_window` and
        `capacity` allow.
    """
    total, length = min(sliding_window or capacity, capacity), array.shape[2]
    if length <= total:
        return ops.pad(array, ((0, 0), (0, 0), (0, total - length), (0, 0)))
    last = ops.expand_dims(lengths - 1, -1)
    positions = last - ops.mod(last - ops.arange(total, dtype="int32"), total)
    positions = ops.reshape(ops.maximum(positions, 0), (-1, 1, total, 1))
    return ops.take_along_axis(array, positions, axis=2)
