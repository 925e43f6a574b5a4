"""The layers' operations that PyTorch has its own way for: attention, and writing into the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma_keras.model.attend_torch import attend
from gemma_keras.model.cache import write

pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (1, 3), (5, 3)])
@pytest.mark.parametrize("mask_rows", [1, 3])
def test_attention_is_the_weighted_mean_of_the_values(length, batch, mask_rows):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((batch, 4, length, 8)).astype("float32")
    key, value = rng.standard_normal((2, batch, 2, 7, 8)).astype("float32")
    mask = rng.random((min(mask_rows, batch), 1, 1, length, 7)) < 0.6
    mask[..., 0] = True
    mask[0, ..., 0, :] = False  # a query that may look nowhere looks everywhere alike
    found = attend(*map(torch.tensor, (query, key, value, mask)), 0.3)
    shared = (np.repeat(array.astype("float64"), 2, axis=1) for array in (key, value))
    keys, values = shared
    scores = np.where(mask[:, :, 0], 0.3 * query @ np.swapaxes(keys, -1, -2), -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ values
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_keys_are_put_where_the_position_says():
    cache = [torch.zeros(2, 2, 6, 4), torch.zeros(2, 2, 6, 4)]
    new = torch.arange(32.0).view(2, 2, 2, 4)
    with torch.inference_mode():
        key, _, _ = write(cache, new, new, torch.tensor(3, dtype=torch.int32), None)
    assert key is cache[0]
    np.testing.assert_array_equal(key[:, :, 3:5], new)
    assert key[:, :, [0, 1, 2, 5]].abs().sum() == 0
