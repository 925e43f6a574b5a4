"""Checkpoints by name: the Hugging Face Hub's cache, KerasHub's presets."""

from __future__ import annotations

import json

import huggingface_hub.constants
import keras_hub
import numpy as np
import pytest
from keras import ops

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from export import export_onnx
from gemma_keras import GemmaCausalLM, open_checkpoint
from gemma_keras.checkpoints.hub import (
    hf_name,
    is_keras_hub_preset,
    opens_with_keras,
    preset_name,
)
from gemma_keras.errors import CheckpointError
from tests.models import tiny_tokenizer_model, write_tiny_hf

once = pytest.mark.backends("torch")  # what is in a folder, no backend changes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the Hub, laid out as huggingface_hub does, with one small model."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--garden--small-gemma"
    write_tiny_hf(repository / "snapshots" / commit, "gemma3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("name", ["garden/small-gemma", "hf://garden/small-gemma"])
def test_a_name_of_the_hub_is_the_folder_in_its_cache(cache, name):
    found, expected = open_checkpoint(name), open_checkpoint(cache)
    assert found.config == expected.config
    for weight in found.weights:
        np.testing.assert_array_equal(found.weights[weight], expected.weights[weight])


def test_where_it_was_fetched_from_is_kept_and_its_folders_name_is_a_commit(cache, tmp_path):
    found = open_checkpoint("hf://garden/small-gemma").provenance
    assert (found["repository"], found["name"]) == ("garden/small-gemma", "small-gemma")
    assert "repository" not in open_checkpoint(cache).provenance
    tuned = cache.parent / "tuned"
    write_tiny_hf(tuned, "gemma3")
    for named, base in (("google/gemma-3-1b-it", True), ("runs/checkpoint-3", False)):
        config = json.loads((tuned / "config.json").read_text()) | {"_name_or_path": named}
        (tuned / "config.json").write_text(json.dumps(config))
        assert open_checkpoint(tuned).provenance.get("base_model") == (named if base else None)


def test_a_name_that_cannot_be_fetched_is_told(cache):
    with pytest.raises(CheckpointError, match="garden/unknown"):
        open_checkpoint("garden/unknown")


@pytest.mark.parametrize(
    "source", ["model.gguf", "/no/such/folder", "a/b/c", "../up/there", "-x/y", "a/", "file name/x"]
)
def test_what_is_no_name_of_the_hub_is_not_looked_up(source):
    assert hf_name(source) is None
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(source)


def test_names_of_keras_hubs_presets_are_known():
    assert is_keras_hub_preset("gemma_2b_en")
    assert is_keras_hub_preset("gemma3_1b")
    assert is_keras_hub_preset("kaggle://keras/gemma3/keras/gemma3_1b/3")
    assert not is_keras_hub_preset("gemma_2b_xx")
    assert not is_keras_hub_preset("sample")
    assert opens_with_keras("gemma_2b_xx") and not opens_with_keras("google/gemma-2b")


@pytest.mark.parametrize(
    "source",
    ["gemma3_1b", "kaggle://keras/gemma3/keras/gemma3_1b/3", "kaggle://keras/gemma3/keras/gemma3_1b",
     "presets/gemma3_1b/"],
)  # fmt: skip
def test_the_name_of_a_preset(source):
    assert preset_name(source) == "gemma3_1b"


@pytest.fixture(scope="module")
def theirs():
    """A small model of KerasHub's."""
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=300,
        image_size=None,
        num_layers=7,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=96,
        intermediate_dim=160,
        head_dim=32,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=7,
        dtype="float32",
    )
    tokenizer = keras_hub.models.Gemma3Tokenizer(
        proto=tiny_tokenizer_model(), has_vision_tokens=False
    )
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer)
    return keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor)


@pytest.mark.keras
def test_a_folder_that_keras_hub_wrote_is_read(theirs, tmp_path):
    theirs.save_to_preset(str(tmp_path))
    ids = np.random.default_rng(0).integers(4, 300, (2, 20)).astype("int32")
    ours = GemmaCausalLM.from_preset(tmp_path, dtype="float32")
    live = GemmaCausalLM.from_keras_hub(theirs, dtype="float32")
    np.testing.assert_array_equal(ours.logits(ids), live.logits(ids))
    assert ours.preprocessor.tokenizer.proto == live.preprocessor.tokenizer.proto
    assert ours.provenance["name"] == tmp_path.name and "preset" not in ours.provenance


@pytest.mark.keras
@once
def test_a_folder_of_keras_hub_that_is_damaged_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"registered_name": "keras_hub>Gemma3Backbone"}')
    with pytest.raises(CheckpointError, match=r"the KerasHub preset .* lacks 'config'"):
        open_checkpoint(tmp_path)


@pytest.mark.keras
@once
def test_a_live_model_of_keras_hub_is_exported(theirs, tmp_path):
    export_onnx(theirs, tmp_path / "bundle", "fp32")
    engine = Engine(Bundle.open(tmp_path / "bundle"))
    ids = np.random.default_rng(0).integers(4, 300, (1, 20)).astype("int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    expected = ops.convert_to_numpy(ops.stop_gradient(theirs(inputs)))[0]
    found = np.concatenate(list(engine.all_logits(ids[0].tolist())))
    assert np.abs(found - expected).max() < 1e-4 * expected.std()
