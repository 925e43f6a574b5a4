"""A live Keras model, LoRA enabled, written as a checkpoint of other projects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from gemma_keras import GemmaCausalLM, open_checkpoint
from tests.gemma_keras.writers import IDS, for_gguf
from tests.models import write_tiny_hf

pytestmark = pytest.mark.keras


def test_a_live_model_is_written_with_its_lora_merged(tmp_path):
    write_tiny_hf(tmp_path / "hf", "gemma3")
    model = GemmaCausalLM.from_preset(tmp_path / "hf", dtype="float32")
    before = model.logits([IDS])[0]
    model.backbone.enable_lora(4)
    rng = np.random.default_rng(0)
    added = [w for w in model.backbone.trainable_variables if "lora" in w.name]
    assert added
    for variable in added:
        variable.assign(0.3 * rng.normal(size=variable.shape))
    ours = model.logits([IDS])[0]
    assert np.abs(ours - before).max() > 0.5

    live = model.as_checkpoint()
    folder = tmp_path / "merged"
    model.export(folder, format="safetensors", dtype="float32", max_shard_bytes=60_000)
    written = open_checkpoint(tmp_path / "merged").weights
    for name, array in live.weights.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    with torch.no_grad():
        found = theirs(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(found, ours, atol=1e-3)

    model = GemmaCausalLM.from_checkpoint(for_gguf(live), dtype="float32")
    model.export(tmp_path / "merged.gguf", format="gguf", tensor_type="f32")
    written = open_checkpoint(tmp_path / "merged.gguf").weights
    for name, array in live.weights.items():
        np.testing.assert_allclose(written[name], array, atol=1e-6 * (array.ndim == 1))
