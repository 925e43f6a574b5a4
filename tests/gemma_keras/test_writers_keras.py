"""A live Keras model written as a checkpoint of other projects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from gemma_keras import GemmaCausalLM, open_checkpoint
from tests.gemma_keras.llama_cpp import llama, needs_llama_cpp
from tests.gemma_keras.writers import IDS, TYPES, for_gguf, same_bits, stored
from tests.models import GENERATIONS, write_tiny_hf

pytestmark = pytest.mark.keras


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_through_keras_and_back_every_tensor_has_its_bits(sources, tmp_path, generation, dtype):
    """A Hugging Face folder, loaded and written again; Gemma 2 with a head of its own."""
    source = sources(generation, dtype, generation != "gemma2")
    model = GemmaCausalLM.from_preset(source, dtype=dtype)
    model.export(tmp_path / "out", format="safetensors")  # by default in the dtype that it has
    same_bits(stored(tmp_path / "out"), stored(source))
    again, checkpoint = open_checkpoint(tmp_path / "out"), open_checkpoint(source)
    assert again.config == checkpoint.config
    assert again.tokenizer_model == checkpoint.tokenizer_model


PROMPT = "The three primary colors are"
NEW_TOKENS = 24
TIE = 0.01  # between our two greatest logits: nothing that a sum in another order could turn


@needs_llama_cpp
@pytest.mark.sample
@pytest.mark.peer
@pytest.mark.spread
@pytest.mark.parametrize("generation", ["gemma3"])  # the sample's; on one backend
def test_llama_cpp_goes_on_with_our_tokens(generation, tmp_path, record_property):
    model = GemmaCausalLM.from_preset("sample", dtype="float32")
    model.export(tmp_path / "sample.gguf", format="gguf", tensor_type="f32")
    tokenizer = model.preprocessor.tokenizer
    ids = [tokenizer.start_token_id, *map(int, tokenizer(PROMPT))]
    length = len(ids) + NEW_TOKENS
    inputs = {key: np.zeros((1, length), "int32") for key in ("token_ids", "padding_mask")}
    inputs["token_ids"][0, : len(ids)] = ids
    inputs["padding_mask"][0, : len(ids)] = 1
    bare = GemmaCausalLM(model.backbone)
    ours = bare.generate(inputs, stop_token_ids=None)["token_ids"][0].tolist()
    logits = np.sort(model.logits([ours[:-1]])[0, len(ids) - 1 :])
    margins = logits[:, -1] - logits[:, -2]
    assert margins.min() > TIE, "a tie: choose another prompt"
    found = llama(tmp_path / "sample.gguf", ids, count=NEW_TOKENS, texts=[PROMPT])
    assert found["encoded"] == [ids]
    assert found["answer"] == ours[len(ids) :]
    record_property(
        f"{NEW_TOKENS} greedy tokens of llama.cpp are ours", f"smallest margin {margins.min():.2f}"
    )


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
