"""`GemmaConfig` from every description of a Gemma."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import transformers

from gemma_keras.config import GemmaConfig, LayerSpec
from gemma_keras.errors import ConfigError
from tests.models import GENERATIONS, hf_config

# As in the published config.json of google/gemma-2b, less what is not architecture.
GEMMA_2B = {
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
# google/gemma-2-27b
GEMMA2_27B = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
# google/gemma-3-1b-pt
GEMMA3_1B = {
    "model_type": "gemma3_text",
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
# google/embeddinggemma-300m
EMBEDDINGGEMMA = {
    "model_type": "gemma3_text",
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3TextModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "dtype": "float32",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 4,
    "max_position_embeddings": 2048,
    "num_attention_heads": 3,
    "num_hidden_layers": 24,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": True,
    "vocab_size": 262144,
}
# google/gemma-3-27b-pt
GEMMA3_27B = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 256,
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def without(data, key):
    return {k: v for k, v in data.items() if k != key}


# --- Hugging Face --------------------------------------------------------------------------------


def test_gemma_2b():
    config = GemmaConfig.from_hf(GEMMA_2B)
    layer = LayerSpec(
        num_heads=8,
        num_kv_heads=1,
        head_dim=256,
        ffw_dim=16384,
        query_scale=1 / 16,
        rope_theta=10_000.0,
    )
    assert config == GemmaConfig(
        vocabulary_size=256_000,
        hidden_dim=2048,
        layers=(layer,) * 18,
        embedding_scale=2048**0.5,
        norm_epsilon=1e-6,
        tied_head=True,
        context_length=8192,
    )
    assert config == GemmaConfig.named("gemma_2b")


def test_gemma2_27b_alternates_windows_and_scales_queries_by_its_own_number():
    config = GemmaConfig.from_hf(GEMMA2_27B)
    local = LayerSpec(
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        ffw_dim=36864,
        query_scale=1 / 12,
        sliding_window=4096,
        post_norms=True,
        attention_soft_cap=50.0,
    )
    assert config.layers == (local, dataclasses.replace(local, sliding_window=None)) * 23
    assert config.final_soft_cap == 30.0
    assert config.embedding_scale == 4608**0.5


def test_gemma3_1b_has_five_local_layers_to_one_global():
    config = GemmaConfig.from_hf(GEMMA3_1B)
    local = LayerSpec(
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        ffw_dim=6912,
        query_scale=1 / 16,
        sliding_window=512,
        rope_theta=10_000.0,
        qk_norm=True,
        post_norms=True,
    )
    every_sixth = dataclasses.replace(local, sliding_window=None, rope_theta=1_000_000.0)
    assert config.layers == ((local,) * 5 + (every_sixth,)) * 4 + (local,) * 2
    assert config.context_length == 32_768


def test_gemma3_27b_is_read_from_the_text_part_with_scaled_global_positions():
    config = GemmaConfig.from_hf(GEMMA3_27B)
    assert len(config.layers) == 62
    assert config.layers[0].query_scale == 168**-0.5
    assert {(s.sliding_window, s.rope_theta, s.rope_scale) for s in config.layers} == {
        (1024, 10_000.0, 1.0),
        (None, 1_000_000.0, 8.0),
    }
    assert config.vocabulary_size == 262_208
    assert config.context_length == 131_072


@pytest.mark.parametrize("name", ["GemmaConfig", "Gemma2Config", "Gemma3TextConfig"])
def test_defaults_are_those_of_transformers(name):
    theirs = getattr(transformers, name)()
    described = GemmaConfig.from_hf(theirs.to_dict())
    assert GemmaConfig.from_hf({"model_type": theirs.model_type}) == described
    assert len(described.layers) == theirs.num_hidden_layers
    assert described.layers[0].ffw_dim == theirs.intermediate_size


def test_multimodal_gemma3_as_transformers_writes_it():
    config = transformers.Gemma3Config(text_config=hf_config("gemma3"))
    assert GemmaConfig.from_hf(config.to_dict()) == GemmaConfig.from_hf(
        config.text_config.to_dict()
    )


def old_style(generation):
    """The tiny model's config.json with the keys of transformers 4."""
    data = hf_config(generation).to_dict()
    ropes = data.pop("rope_parameters")
    data.pop("layer_types", None)
    data.pop("_sliding_window_pattern", None)
    if generation == "gemma3":
        scaling = ropes["full_attention"]
        data["rope_theta"] = scaling.pop("rope_theta")
        data["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        data["rope_scaling"] = scaling
        data["sliding_window_pattern"] = 6
    else:
        data["rope_theta"] = ropes["rope_theta"]
    if generation == "gemma":
        data["hidden_act"] = "gelu"
    return data


@pytest.mark.parametrize("generation", GENERATIONS)
def test_old_keys_and_new_keys_say_the_same(generation):
    new = GemmaConfig.from_hf(hf_config(generation).to_dict())
    assert GemmaConfig.from_hf(old_style(generation)) == new
    thetas = {"gemma": {500.0}, "gemma2": {500.0}, "gemma3": {100.0, 2000.0}}
    assert {spec.rope_theta for spec in new.layers} == thetas[generation]


def test_layer_types_win_over_the_pattern():
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    data = GEMMA3_1B | {"num_hidden_layers": 3, "layer_types": types}
    windows = [spec.sliding_window for spec in GemmaConfig.from_hf(data).layers]
    assert windows == [None, 512, 512]


def test_a_sliding_window_pattern_other_than_six_is_heard():
    for key in "sliding_window_pattern", "_sliding_window_pattern":
        data = without(GEMMA3_1B, "sliding_window_pattern") | {key: 2, "num_hidden_layers": 5}
        windows = [spec.sliding_window for spec in GemmaConfig.from_hf(data).layers]
        assert windows == [512, None, 512, None, 512]


def test_embeddinggemma():
    config = GemmaConfig.from_hf(EMBEDDINGGEMMA)
    assert config == GemmaConfig.named("embeddinggemma_300m")
    assert all(layer.bidirectional for layer in config.layers)
    # half of the file's window each way, and the token itself
    assert [layer.sliding_window for layer in config.layers] == [*[257] * 5, None] * 4
    assert config.context_length == 2048


@pytest.mark.parametrize("window", [1, 2, 3, 12, 13, 512, 513])
def test_a_bidirectional_window_is_halved_as_transformers_halves_it(window):
    data = EMBEDDINGGEMMA | {"sliding_window": window}
    config = GemmaConfig.from_hf(data)
    theirs = transformers.Gemma3TextConfig(**data)
    assert config.layers[0].sliding_window == theirs.sliding_window
    written = config.to_hf()
    assert GemmaConfig.from_hf(written) == config
    assert transformers.Gemma3TextConfig(**written).sliding_window == theirs.sliding_window
    assert GemmaConfig.from_hf(theirs.to_dict() | {"sliding_window": window}) == config


def test_a_model_bidirectional_in_part_has_no_hugging_face_config():
    config = GemmaConfig.from_hf(EMBEDDINGGEMMA)
    causal = dataclasses.replace(config.layers[3], bidirectional=False)
    mixed = dataclasses.replace(config, layers=(*config.layers[:3], causal, *config.layers[4:]))
    with pytest.raises(ConfigError, match="cannot be written"):
        mixed.to_hf()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("value", [True, "vision", 1])
def test_only_a_gemma3_looks_both_ways_and_says_so_plainly(generation, value):
    data = hf_config(generation).to_dict() | {"use_bidirectional_attention": value}
    if generation == "gemma3" and value is True:
        assert GemmaConfig.from_hf(data).layers[0].bidirectional
        return
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        GemmaConfig.from_hf(data)


@pytest.mark.parametrize("data", [GEMMA_2B, GEMMA2_27B, GEMMA3_1B], ids=lambda d: d["model_type"])
def test_an_unknown_key_is_refused_by_name(data):
    with pytest.raises(ConfigError, match="num_experts"):
        GemmaConfig.from_hf(data | {"num_experts": 8})


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"model_type": None},
        {"model_type": ["gemma2"]},
        {"hidden_act": "silu", "hidden_activation": "silu"},
        {"hidden_activation": "gelu"},
        {"attention_bias": True},
        {"use_bidirectional_attention": True},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 2.0},
        {"hidden_size": "4608"},
        {"num_key_value_heads": 5},
        {"head_dim": 127},
        {"query_pre_attn_scalar": 0},
        {"query_pre_attn_scalar": "144"},
        {"query_pre_attn_scalar": None},
        {"sliding_window": -1},
        {"sliding_window": None},
        {"layer_types": 5},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["chunked_attention"] * 46},
        {"tie_word_embeddings": "no"},
        {"rms_norm_eps": float("nan")},
        {"final_logit_softcapping": -30.0},
        {"attn_logit_softcapping": float("inf")},
        {"rope_theta": "10000"},
        {"rope_scaling": 8.0},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "beta_fast": 32}},
        {"rope_parameters": ["linear"]},
    ],
    ids=json.dumps,
)
def test_what_is_not_a_gemma_is_refused_with_a_reason(change):
    with pytest.raises(ConfigError) as error:
        GemmaConfig.from_hf(GEMMA2_27B | change)
    assert len(str(error.value)) > 20


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_new", "quick_gelu", "swish"])
@pytest.mark.parametrize("data", [GEMMA_2B, GEMMA2_27B, GEMMA3_27B], ids=lambda d: d["model_type"])
def test_another_activation_is_refused_by_name(data, activation):
    change = {"hidden_activation": activation}
    if "text_config" in data:
        change = {"text_config": data["text_config"] | change}
    said = f"the activation is '{activation}'; Gemma's is gelu_pytorch_tanh"
    with pytest.raises(ConfigError, match=f"^{said}$"):
        GemmaConfig.from_hf(data | change)


def test_gemma3_with_rope_parameters_of_an_unknown_layer_kind_is_refused():
    with pytest.raises(ConfigError, match="chunked_attention"):
        GemmaConfig.from_hf(GEMMA3_1B | {"rope_parameters": {"chunked_attention": {}}})


def test_multimodal_gemma3_without_a_text_part_is_refused():
    with pytest.raises(ConfigError, match="text_config"):
        GemmaConfig.from_hf({"model_type": "gemma3"})


def test_an_unknown_size_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"known: .*gemma3_270m, .*gemma_2b, gemma_7b"):
        GemmaConfig.named("gemma_3b")


# --- GGUF ----------------------------------------------------------------------------------------


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
    assert GemmaConfig.from_gguf(gguf_metadata(generation), tied_head=True) == GemmaConfig.from_hf(
        hf
    )


def test_gguf_local_layers_of_gemma3_rotate_with_10_000_unless_it_says_otherwise():
    metadata = without(gguf_metadata("gemma3"), "gemma3.rope.freq_base_swa")
    layers = GemmaConfig.from_gguf(metadata, tied_head=True).layers
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
    config = GemmaConfig.from_gguf(metadata, tied_head=True)
    assert {spec.query_scale for spec in config.layers} == {scalar**-0.5}


def test_gguf_sizes_that_differ_between_layers_are_kept():
    metadata = gguf_metadata("gemma") | {
        "gemma.feed_forward_length": [160, 96, 64],
        "gemma.attention.head_count_kv": [1, 2, 4],
    }
    layers = GemmaConfig.from_gguf(metadata, tied_head=False).layers
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
        GemmaConfig.from_gguf(without(gguf_metadata("gemma3"), key), tied_head=True)


@pytest.mark.parametrize(
    "change",
    [
        {"general.architecture": "llama"},
        {"gemma3.block_count": "8"},
        {"gemma3.rope.scaling.type": "yarn"},
        {"gemma3.attention.value_length": 64},
        {"gemma3.feed_forward_length": [160, 160]},
        {"gemma3.attention.head_count_kv": 3},
        {"gemma3.attention.sliding_window": 0},
        {"gemma3.attention.causal": False},
    ],
    ids=json.dumps,
)
def test_gguf_metadata_of_something_else_are_refused(change):
    with pytest.raises(ConfigError):
        GemmaConfig.from_gguf(gguf_metadata("gemma3") | change, tied_head=True)


# --- to_dict, to_hf ------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [GEMMA_2B, GEMMA2_27B, GEMMA3_27B], ids=lambda d: d["model_type"])
def test_to_dict_is_json_that_from_dict_reads_back(data):
    config = GemmaConfig.from_hf(data)
    assert GemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


WRITTEN = [
    *(GemmaConfig.from_hf(data) for data in (GEMMA_2B, GEMMA2_27B, GEMMA3_1B, GEMMA3_27B)),
    *(GemmaConfig.from_hf(hf_config(g, tied).to_dict()) for g in GENERATIONS for tied in (True, False)),
    GemmaConfig.named("gemma_7b"),
    GemmaConfig.named("gemma3_270m"),
    GemmaConfig.named("embeddinggemma_300m"),
]  # fmt: skip


@pytest.mark.parametrize("config", WRITTEN)
def test_to_hf_is_json_that_from_hf_and_transformers_read_back(config):
    data = json.loads(json.dumps(config.to_hf()))
    assert GemmaConfig.from_hf(data) == config
    theirs = transformers.AutoConfig.for_model(**data)
    assert GemmaConfig.from_hf(theirs.to_dict()) == config


def test_to_hf_writes_round_numbers_as_they_are_published():
    assert GemmaConfig.from_hf(GEMMA2_27B).to_hf()["query_pre_attn_scalar"] == 144
    assert GemmaConfig.from_hf(GEMMA3_27B).to_hf()["query_pre_attn_scalar"] == 168


@pytest.mark.parametrize(
    "change",
    [
        {"embedding_scale": 3.0},
        {"layers": lambda s, i: {"ffw_dim": 64} if i == 1 else {}},
        {"layers": lambda s, i: {"sliding_window": 9} if i == 2 else {}},
        {"layers": lambda s, i: {"rope_theta": 7.0} if i == 3 else {}},
        {"layers": lambda s, i: {"post_norms": False}},
        {"layers": lambda s, i: {"rope_scale": 2.0} if s.sliding_window else {}},
    ],
)
def test_to_hf_refuses_what_that_file_cannot_say(change):
    config = GemmaConfig.from_hf(hf_config("gemma3").to_dict())
    if callable(edit := change.get("layers")):
        layers = enumerate(config.layers)
        change = {"layers": tuple(dataclasses.replace(s, **edit(s, i)) for i, s in layers)}
    with pytest.raises(ConfigError, match=r"cannot be written as a Hugging Face config\.json"):
        dataclasses.replace(config, **change).to_hf()


def test_from_dict_refuses_unknown_missing_and_wrong_entries():
    good = GemmaConfig.named("gemma_2b").to_dict()
    unknown_in_layer = {"layers": [good["layers"][0] | {"experts": 8}]}
    for bad in (
        good | {"experts": 8},
        good | unknown_in_layer,
        without(good, "hidden_dim"),
        without(good, "layers"),
        good | {"layers": []},
        good | {"layers": 18},
        good | {"tied_head": None},
        good | {"layers": [good["layers"][0] | {"qk_norm": "no"}]},
    ):
        with pytest.raises(ConfigError):
            GemmaConfig.from_dict(bad)


def test_reading_configurations_and_checkpoints_starts_no_keras():
    code = (
        "import sys, gemma_keras, gemma_keras.config, gemma_keras.checkpoints\n"
        "gemma_keras.open_checkpoint, gemma_keras.GemmaConfig, gemma_keras.LayerSpec\n"
        "started = {'keras', 'keras_hub', 'tensorflow', 'jax', 'torch'} & set(sys.modules)\n"
        "assert not started, started\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
