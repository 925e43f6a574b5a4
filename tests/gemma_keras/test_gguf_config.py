"""A GGUF file's metadata as a configuration."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma_keras.checkpoints.gguf.config import config_from_gguf
from gemma_keras.checkpoints.hf.config import config_from_hf, named_config
from gemma_keras.errors import ConfigError
from tests.models import GENERATIONS, hf_config, without


def gguf_metadata(generation):
    """What llama.cpp writes about the tiny model, with a vocabulary of the right size."""
    metadata = {
        "block_count": hf_config(generation).num_hidden_layers,
        "context_length": 128,
        "embedding_length": 96,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-3)),
        "rope.freq_base": 500.0,
    }
    if generation == "gemma2":
        metadata |= {
            "attention.sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 6.0,
        }
    if generation == "gemma3":
        metadata |= {
            "attention.sliding_window": 7,
            "rope.freq_base": 2000.0,
            "rope.freq_base_swa": 100.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        }
    return {
        "general.architecture": generation,
        "tokenizer.ggml.tokens": ["piece"] * 300,
    } | {f"{generation}.{key}": value for key, value in metadata.items()}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_gguf_metadata_describe_the_model_that_config_json_describes(generation):
    hf = hf_config(generation).to_dict()
    if generation != "gemma":
        hf["query_pre_attn_scalar"] = 32  # GGUF has no key for it
    assert config_from_gguf(gguf_metadata(generation), tied_head=True) == config_from_hf(hf)


def test_gguf_local_layers_of_gemma3_rotate_with_10_000_unless_it_says_otherwise():
    metadata = without(gguf_metadata("gemma3"), "gemma3.rope.freq_base_swa")
    layers = config_from_gguf(metadata, tied_head=True).layers
    assert [spec.rope_theta for spec in layers] == [10_000.0] * 5 + [2000.0] + [10_000.0] * 2


@pytest.mark.parametrize(
    ("generation", "layers", "hidden", "scalar"),
    [
        ("gemma2", 46, 4608, 144),
        ("gemma2", 42, 3584, 256),
        ("gemma3", 62, 5376, 168),
        ("gemma3", 48, 3840, 256),
    ],
)
def test_gguf_query_scale_of_the_27b_models(generation, layers, hidden, scalar):
    metadata = gguf_metadata(generation) | {
        f"{generation}.block_count": layers,
        f"{generation}.embedding_length": hidden,
        f"{generation}.attention.head_count": 32,
        f"{generation}.attention.head_count_kv": 16,
        f"{generation}.attention.key_length": 128 if scalar != 256 else 256,
        f"{generation}.attention.value_length": 128 if scalar != 256 else 256,
    }
    config = config_from_gguf(metadata, tied_head=True)
    assert {spec.query_scale for spec in config.layers} == {scalar**-0.5}


def test_gguf_sizes_that_differ_between_layers_are_kept():
    metadata = gguf_metadata("gemma") | {
        "gemma.feed_forward_length": [160, 96, 64],
        "gemma.attention.head_count_kv": [1, 2, 4],
    }
    layers = config_from_gguf(metadata, tied_head=False).layers
    assert [(s.ffw_dim, s.num_kv_heads) for s in layers] == [(160, 1), (96, 2), (64, 4)]


@pytest.mark.parametrize(
    "key",
    [
        "gemma3.block_count",
        "gemma3.embedding_length",
        "gemma3.feed_forward_length",
        "gemma3.attention.head_count",
        "gemma3.attention.layer_norm_rms_epsilon",
        "gemma3.context_length",
        "tokenizer.ggml.tokens",
    ],
)
def test_a_missing_gguf_key_is_named(key):
    with pytest.raises(ConfigError, match=key):
        config_from_gguf(without(gguf_metadata("gemma3"), key), tied_head=True)


@pytest.mark.parametrize(
    "change",
    [
        {"general.architecture": "llama"},
        {"gemma3.block_count": "8"},
        {"gemma3.rope.scaling.type": "yarn"},
        {"gemma3.attention.value_length": 64},
        {"gemma3.feed_forward_length": [160, 160]},
        {"gemma3.attention.head_count_kv": 3},
        {"gemma3.attention.sliding_window": -1},
        {"gemma3.attention.sliding_window": 1 << 40},
        {"gemma3.attention.sliding_window_pattern": [True] * 3},
        {"gemma3.attention.causal": False},
        {"gemma3.rope.dimension_count": 16},
        {"gemma3.attn_logit_softcapping": 50.0},
        {"gemma3.vocab_size": 299},
        {"gemma3.expert_count": 8},
        {"gemma3.foo": 1},
        {"general.architecture": "gemma2", "gemma2.attention.sliding_window": 0},
    ],
    ids=json.dumps,
)
def test_gguf_metadata_of_something_else_are_refused(change):
    kind = change.get("general.architecture", "gemma3")
    with pytest.raises(ConfigError):
        config_from_gguf(
            gguf_metadata(kind if kind in GENERATIONS else "gemma3") | change, tied_head=True
        )


@pytest.mark.parametrize(
    "change",
    [
        {"general.size_label": "270M", "quantize.imatrix.file": "x.dat", "split.count": 0},
        {"gemma3.rope.dimension_count": 32, "gemma3.rope.scaling.finetuned": False},
        {"gemma3.expert_count": 0, "gemma3.vocab_size": 300, "gemma3.attn_logit_softcapping": 0.0},
        {"gemma3.final_logit_softcapping": 0.0, "gemma3.attention.sliding_window_pattern": 6},
        {"gemma3.attention.sliding_window_pattern": [True] * 5 + [False] + [True] * 2},
    ],
    ids=json.dumps,
)
def test_gguf_keys_that_say_what_gemma_is_are_passed_over(change):
    plain = gguf_metadata("gemma3")
    assert config_from_gguf(plain | change, tied_head=True) == config_from_gguf(
        plain, tied_head=True
    )


def test_a_gguf_gemma3_without_a_window_has_global_layers_alone():
    metadata = gguf_metadata("gemma3") | {"gemma3.attention.sliding_window": 0}
    layers = config_from_gguf(metadata, tied_head=True).layers
    assert {(s.sliding_window, s.rope_theta, s.rope_scale) for s in layers} == {(None, 2000.0, 8.0)}


def test_a_gguf_factor_without_a_type_scales_positions_as_llama_cpp_reads_it():
    metadata = without(gguf_metadata("gemma3"), "gemma3.rope.scaling.type")
    assert config_from_gguf(metadata, tied_head=True) == config_from_gguf(
        gguf_metadata("gemma3"), tied_head=True
    )
    none = metadata | {"gemma3.rope.scaling.type": "none"}
    assert {s.rope_scale for s in config_from_gguf(none, tied_head=True).layers} == {1.0}


def ollama_metadata(name):
    """A published Gemma 3 as Ollama's converter described it."""
    hf = named_config(name)
    first = hf.layers[0]
    metadata = {
        "block_count": len(hf.layers),
        "context_length": hf.context_length,
        "embedding_length": hf.hidden_dim,
        "feed_forward_length": first.ffw_dim,
        "attention.head_count": first.num_heads,
        "attention.head_count_kv": first.num_kv_heads,
        "attention.sliding_window": first.sliding_window,
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
    }
    if name == "gemma3_1b":
        metadata |= {
            "attention.layer_norm_rms_epsilon": 1e-6,
            "final_logit_softcapping": 30.0,
            "rope.local.freq_base": 10_000.0,
            "rope.global.freq_base": 1_000_000.0,
        }
    else:
        metadata |= {"vision.block_count": 27, "mm.tokens_per_image": 256}
    return {
        "general.architecture": "gemma3",
        "tokenizer.ggml.tokens": range(hf.vocabulary_size),
    } | {f"gemma3.{key}": value for key, value in metadata.items()}


@pytest.mark.parametrize("name", ["gemma3_1b", "gemma3_4b", "gemma3_12b", "gemma3_27b"])
def test_ollamas_own_keys_describe_the_published_model(name):
    # its files leave the scaling of positions out and cap the 1B's logits; Ollama knows better
    assert config_from_gguf(ollama_metadata(name), tied_head=True) == named_config(name)
