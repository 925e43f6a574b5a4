"""Computes attention with PyTorch's fused kernel, which does not store the scores.

The backend's counterpart of what `GemmaAttention` writes out in `keras.ops`: softmax of scaled and
masked products, times the values. It does not support a soft cap.
"""

from __future__ import annotations

import torch

_MASKED = -1e30  # added to a score of this size it leaves nothing of it: all masked is uniform


def attend(query, key, value, mask, scale: float):
    """Computes attention.

    Args:
        query: float `(batch, heads, length, head_dim)`.
        key: `(batch, kv_heads, total, head_dim)`; as many heads in a row as there are more of them
            share one of its.
        value: like `key`.
        mask: true where a query may look, bool `(batch or 1, 1, 1, length, total)`.
        scale: of the products.

    Returns:
        A tensor like `query`.
    """
    batch, _, length, head_dim = query.shape
    least = max(_MASKED, torch.finfo(query.dtype).min / 2)  # half: a score may be added to it
    added = torch.where(mask[:, :, 0], 0.0, least).to(query.dtype)  # (batch or 1, 1, length, total)
    # One token's heads that share a key are rows of one product, which is quicker than many.
    rows = (batch, key.shape[1], -1, head_dim) if length == 1 else query.shape
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows), key, value, attn_mask=added, scale=scale, enable_gqa=length > 1
    )
    return attended.reshape(query.shape)
