"""A text embedder's folder: what is read, and what is refused before anything is built."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_keras.checkpoints.hf.config import config_to_hf
from gemma_keras.checkpoints.opening.sentence_transformers import open_embedder
from gemma_keras.errors import CheckpointError, ConfigError, ModelError
from tests.gemma_keras.embedder_files import (
    DIM,
    FOLDERS,
    HIDDEN,
    MAX_TOKENS,
    PROMPTS,
    WIDE,
    dense_config,
    pooling_config,
    write_json,
    write_tiny_embedder,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    return folder, *write_tiny_embedder(folder)


@pytest.fixture
def copy(written, tmp_path):
    """A folder of one's own to damage."""
    return shutil.copytree(written[0], tmp_path / "copy")


def modules(folder):
    return json.loads((folder / "modules.json").read_text())


def test_everything_is_read(written):
    folder, transformer, matrices = written
    found = open_embedder(folder)
    assert config_to_hf(found.transformer.config)["use_bidirectional_attention"] is True
    assert (found.normalize, found.max_tokens) == (True, MAX_TOKENS)
    assert (found.prompts, found.default_prompt_name) == (PROMPTS, None)
    for ours, theirs in zip(found.projections, matrices, strict=True):
        np.testing.assert_array_equal(ours, theirs.T)
    # the transformer was saved without a head, so its tensors' names have no prefix
    theirs = dict(transformer.named_parameters())
    assert "embed_tokens.weight" in theirs
    for name, spec in found.transformer.weights.specs.items():
        expected = theirs[spec.hf.removeprefix("model.")].detach().numpy()
        np.testing.assert_array_equal(
            found.transformer.weights[name], spec.from_file(expected, "hf"), err_msg=name
        )


def test_the_form_of_newer_versions_is_read(copy):
    kinds = {
        "Transformer": "base.modules.transformer",
        "Pooling": "sentence_transformer.modules.pooling",
        "Dense": "base.modules.dense",
        "Normalize": "base.modules.normalize",
    }
    newer = modules(copy)
    for module in newer:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.{kinds[kind]}.{kind}"
    write_json(copy / "modules.json", newer)
    pooling = {"embedding_dimension": HIDDEN, "pooling_mode": "mean", "include_prompt": True}
    write_json(copy / "1_Pooling" / "config.json", pooling)
    more = {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
        "use_residual": False,
    }
    write_json(copy / "2_Dense" / "config.json", dense_config(HIDDEN, WIDE) | more)
    assert [matrix.shape for matrix in open_embedder(copy).projections] == [
        (HIDDEN, WIDE),
        (WIDE, DIM),
    ]


def test_without_the_optional_files_the_model_says_what_it_can(copy):
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        (copy / name).unlink()
    write_json(copy / "modules.json", modules(copy)[:2])
    found = open_embedder(copy)
    assert found.max_tokens == found.transformer.config.context_length == 128
    assert (found.prompts, found.projections, found.normalize) == ({}, (), False)


def test_no_text_is_longer_than_the_transformer_was_made_for(copy):
    write_json(copy / "sentence_bert_config.json", {"max_seq_length": 10**12})
    assert open_embedder(copy).max_tokens == 128


@pytest.mark.parametrize(
    "path",
    ["..", "../2_Dense", "/etc", "2_Dense/../..", ".", "C:\\2_Dense", "a\0b", None, 3, ["2_Dense"]],
    ids=repr,
)
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_elsewhere_is_refused(copy, path, step):
    changed = modules(copy)
    changed[step]["path"] = path
    write_json(copy / "modules.json", changed)
    with pytest.raises(CheckpointError, match=r"modules\.json names a folder outside its own"):
        open_embedder(copy)


def _kinds(*kinds):
    return [{"path": p, "type": f"x.{k}"} for k, p in zip(kinds, FOLDERS, strict=False)]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("modules.json", {}, "must hold a JSON list"),
        ("modules.json", ["Transformer"], "must hold a JSON list"),
        ("modules.json", [], "describes nothing"),
        ("modules.json", _kinds("Transformer"), "describes Transformer;"),
        ("modules.json", _kinds("Transformer", "WeightedLayerPooling"), "WeightedLayerPooling;"),
        ("modules.json", _kinds("Transformer", "Pooling", "LayerNorm"), "Pooling, LayerNorm;"),
        ("modules.json", _kinds("Transformer", "Pooling", "Normalize", "Dense"), "Dense;"),
        ("modules.json", _kinds("Pooling", "Transformer"), "describes Pooling, Transformer;"),
        (
            "1_Pooling/config.json",
            pooling_config() | {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
            "pools by lasttoken;",
        ),
        (
            "1_Pooling/config.json",
            pooling_config() | {"pooling_mode_cls_token": True},
            "pools by mean_tokens, cls_token;",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pools by lasttoken;"),
        ("1_Pooling/config.json", {}, "pools by None;"),
        ("1_Pooling/config.json", pooling_config() | {"include_prompt": False}, "include_prompt"),
        ("2_Dense/config.json", dense_config(HIDDEN, WIDE) | {"bias": True}, "has bias=True;"),
        (
            "2_Dense/config.json",
            dense_config(HIDDEN, WIDE) | {"activation_function": "torch.nn.modules.Tanh"},
            "activation_function='torch.nn.modules.Tanh'",
        ),
        (
            "2_Dense/config.json",
            {"in_features": HIDDEN, "out_features": WIDE, "bias": False},  # its default is tanh
            "activation_function=None",
        ),
        ("2_Dense/config.json", dense_config(HIDDEN, WIDE) | {"use_residual": True}, "residual"),
        ("2_Dense/config.json", dense_config(WIDE, WIDE), "its input has 96"),
        ("2_Dense/config.json", dense_config(HIDDEN, 10**15), r"shape \[56, 96\]"),
        ("3_Dense/config.json", dense_config(HIDDEN, DIM), "its input has 56"),
        ("3_Dense/config.json", [], "must hold a JSON object"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "lower case"),
        ("sentence_bert_config.json", {"max_seq_length": "2048"}, "max_seq_length='2048'"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "max_seq_length=2;"),
        ("config_sentence_transformers.json", {"prompts": ["query"]}, "names and texts"),
        ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "names and texts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default_prompt_name"),
    ],
    ids=str,
)
def test_what_embeddinggemma_does_not_do_is_refused(copy, file, content, words):
    write_json(copy / file, content)
    with pytest.raises(ModelError, match=words):
        open_embedder(copy)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"linear.weight": np.zeros((HIDDEN, WIDE), np.float32)},
            r"shape \[96, 56\]; .* \[56, 96\]",
        ),
        ({"weight": np.zeros((WIDE, HIDDEN), np.float32)}, "holds weight;"),
        (
            {
                "linear.weight": np.zeros((WIDE, HIDDEN), np.float32),
                "linear.bias": np.zeros(WIDE, np.float32),
            },
            r"linear\.bias",
        ),
        ({"linear.weight": np.full((WIDE, HIDDEN), np.nan, np.float32)}, "not finite"),
    ],
    ids=["turned", "named otherwise", "bias", "nan"],
)
def test_a_layer_of_another_shape_is_refused(copy, tensors, words):
    save_file(tensors, copy / "2_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        open_embedder(copy)


def test_a_layer_cut_short_is_refused(copy):
    path = copy / "2_Dense" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        open_embedder(copy)


def test_pickles_are_not_read(copy):
    path = copy / "2_Dense" / "model.safetensors"
    path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="save the module's weights as safetensors"):
        open_embedder(copy)


def test_a_folder_that_is_no_embedder_is_refused(copy, tmp_path):
    (copy / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=r"modules\.json does not exist"):
        open_embedder(copy)
    with pytest.raises(CheckpointError, match="Hugging Face Hub"):
        open_embedder(tmp_path / "nothing")


def test_a_model_that_is_no_gemma_is_refused(copy):
    data = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", data | {"model_type": "qwen3"})
    with pytest.raises(ConfigError, match="qwen3"):
        open_embedder(copy)
