"""`GemmaConfig` from every description of a Gemma."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys

import pytest
import transformers

from gemma_keras.checkpoints.hf.config import config_from_hf, config_to_hf, named_config
from gemma_keras.config import GemmaConfig, LayerSpec
from gemma_keras.errors import ConfigError
from tests.models import GENERATIONS, hf_config, without

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


# --- Hugging Face --------------------------------------------------------------------------------


def test_gemma_2b():
    config = config_from_hf(GEMMA_2B)
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
    assert config == named_config("gemma_2b")


def test_gemma2_27b_alternates_windows_and_scales_queries_by_its_own_number():
    config = config_from_hf(GEMMA2_27B)
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
    config = config_from_hf(GEMMA3_1B)
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
    config = config_from_hf(GEMMA3_27B)
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
    described = config_from_hf(theirs.to_dict())
    assert config_from_hf({"model_type": theirs.model_type}) == described
    assert len(described.layers) == theirs.num_hidden_layers
    assert described.layers[0].ffw_dim == theirs.intermediate_size


def test_multimodal_gemma3_as_transformers_writes_it():
    config = transformers.Gemma3Config(text_config=hf_config("gemma3"))
    assert config_from_hf(config.to_dict()) == config_from_hf(config.text_config.to_dict())


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
    new = config_from_hf(hf_config(generation).to_dict())
    assert config_from_hf(old_style(generation)) == new
    thetas = {"gemma": {500.0}, "gemma2": {500.0}, "gemma3": {100.0, 2000.0}}
    assert {spec.rope_theta for spec in new.layers} == thetas[generation]


def test_layer_types_win_over_the_pattern():
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    data = GEMMA3_1B | {"num_hidden_layers": 3, "layer_types": types}
    windows = [spec.sliding_window for spec in config_from_hf(data).layers]
    assert windows == [None, 512, 512]


def test_a_sliding_window_pattern_other_than_six_is_heard():
    for key in "sliding_window_pattern", "_sliding_window_pattern":
        data = without(GEMMA3_1B, "sliding_window_pattern") | {key: 2, "num_hidden_layers": 5}
        windows = [spec.sliding_window for spec in config_from_hf(data).layers]
        assert windows == [512, None, 512, None, 512]


def test_embeddinggemma():
    config = config_from_hf(EMBEDDINGGEMMA)
    assert config == named_config("embeddinggemma_300m")
    assert all(layer.bidirectional for layer in config.layers)
    # half of the file's window each way, and the token itself
    assert [layer.sliding_window for layer in config.layers] == [*[257] * 5, None] * 4
    assert config.context_length == 2048


@pytest.mark.parametrize("window", [1, 2, 3, 12, 13, 512, 513])
def test_a_bidirectional_window_is_halved_as_transformers_halves_it(window):
    data = EMBEDDINGGEMMA | {"sliding_window": window}
    config = config_from_hf(data)
    theirs = transformers.Gemma3TextConfig(**data)
    assert config.layers[0].sliding_window == theirs.sliding_window
    written = config_to_hf(config)
    assert config_from_hf(written) == config
    assert transformers.Gemma3TextConfig(**written).sliding_window == theirs.sliding_window
    assert config_from_hf(theirs.to_dict() | {"sliding_window": window}) == config


def test_a_model_bidirectional_in_part_has_no_hugging_face_config():
    config = config_from_hf(EMBEDDINGGEMMA)
    causal = dataclasses.replace(config.layers[3], bidirectional=False)
    mixed = dataclasses.replace(config, layers=(*config.layers[:3], causal, *config.layers[4:]))
    with pytest.raises(ConfigError, match="cannot be written"):
        config_to_hf(mixed)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("value", [True, "vision", 1])
def test_only_a_gemma3_looks_both_ways_and_says_so_plainly(generation, value):
    data = hf_config(generation).to_dict() | {"use_bidirectional_attention": value}
    if generation == "gemma3" and value is True:
        assert config_from_hf(data).layers[0].bidirectional
        return
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        config_from_hf(data)


@pytest.mark.parametrize("data", [GEMMA_2B, GEMMA2_27B, GEMMA3_1B], ids=lambda d: d["model_type"])
def test_an_unknown_key_is_refused_by_name(data):
    with pytest.raises(ConfigError, match="num_experts"):
        config_from_hf(data | {"num_experts": 8})


def of_transformers_4():
    """The generic keys of a `config.json` that transformers 4.57 writes, with its defaults."""
    return json.loads(
        """{"return_dict": true, "output_hidden_states": false, "torchscript": false, "dtype": "bfloat16",
        "pruned_heads": {}, "chunk_size_feed_forward": 0, "is_encoder_decoder": false,
        "is_decoder": false, "cross_attention_hidden_size": null, "add_cross_attention": false,
        "tie_encoder_decoder": false, "architectures": ["GemmaForCausalLM"], "finetuning_task": null,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "task_specific_params": null,
        "problem_type": null, "tokenizer_class": null, "prefix": null, "bos_token_id": 2,
        "pad_token_id": 0, "eos_token_id": 1, "sep_token_id": null, "decoder_start_token_id": null,
        "max_length": 20, "min_length": 0, "do_sample": false, "early_stopping": false,
        "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
        "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0, "bad_words_ids": null, "num_return_sequences": 1,
        "output_scores": false, "return_dict_in_generate": false, "forced_bos_token_id": null,
        "forced_eos_token_id": null, "remove_invalid_values": false,
        "exponential_decay_length_penalty": null, "suppress_tokens": null,
        "begin_suppress_tokens": null, "num_beam_groups": 1, "diversity_penalty": 0.0,
        "_name_or_path": "", "_commit_hash": null, "_attn_implementation_autoset": true,
        "transformers_version": "4.57.6", "tf_legacy_loss": false, "use_bfloat16": false,
        "output_attentions": false, "gradient_checkpointing": false}"""
    )


def of_transformers_5():
    """The generic keys of the transformers that is installed, of models and of generation."""
    config = transformers.PretrainedConfig().to_dict() | transformers.GenerationConfig().to_dict()
    fields = set(inspect.signature(transformers.PretrainedConfig).parameters) - {"kwargs", "args"}
    return config | dict.fromkeys(fields)


def of_other_tools():
    """What Unsloth, TRL, MLX, vLLM, older transformers and the multimodal classes leave there."""
    return {
        "unsloth_fixed": True,
        "unsloth_version": "2026.1",
        "boi_token_index": 255_999,
        "image_token_index": 262_144,
        "mm_tokens_per_image": 256,
        "vision_config": {"hidden_size": 8},
        "auto_map": {"AutoModel": "x.Y"},
        "num_labels": 2,
        "classifier_dropout": None,
        "attn_implementation": "eager",
        "trust_remote_code": False,
        "max_seq_length": 2048,
        "pretraining_tp": 1,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "rope_scaling": None,
        "quantization_config": None,
        "use_bidirectional_attention": None,
        "tie_word_embeddings": None,
        "logits_to_keep": 0,
        "ignore_index": -100,
        "something_that_nobody_set": None,
    }


@pytest.mark.parametrize("keys", [of_transformers_4, of_transformers_5, of_other_tools])
@pytest.mark.parametrize("data", [GEMMA_2B, GEMMA2_27B, GEMMA3_1B, GEMMA3_27B])
def test_keys_that_cannot_change_the_mathematics_are_passed_over(data, keys):
    foreign = {key: value for key, value in keys().items() if key not in ("model_type", *data)}
    assert len(foreign) > 5
    expected = config_from_hf(data)
    assert config_from_hf(data | foreign) == expected
    if "text_config" in data:
        inner = {k: v for k, v in foreign.items() if k not in data["text_config"]}
        assert config_from_hf(data | {"text_config": data["text_config"] | inner}) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"pretraining_tp": True}, "pretraining_tp=True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, "per_layer_config="),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"use_sliding_window": False}, "use_sliding_window is False"),
        (
            {"sliding_window_pattern": 6},
            "sliding_window_pattern is 6; every implementation of gemma2 uses 2",
        ),
        ({"head_type": "x"}, "does not know: head_type"),
        ({"num_experts_per_token": 2}, "does not know: num_experts_per_token"),
        ({"architectures": ["Gemma2ForSequenceClassification"]}, "a classifier"),
        ({"model_type": "gemma3n"}, "Gemma 1, 2 and 3"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_keys_that_can_change_the_mathematics_are_refused_by_name(change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        config_from_hf(GEMMA2_27B | change)


def test_what_stands_around_the_text_part_may_not_contradict_it():
    assert config_from_hf(GEMMA3_27B | {"hidden_size": 5376}) == config_from_hf(GEMMA3_27B)
    with pytest.raises(ConfigError, match="hidden_size=640, but its text_config has 5376"):
        config_from_hf(GEMMA3_27B | {"hidden_size": 640})
    untied = config_from_hf(GEMMA3_27B | {"tie_word_embeddings": False})
    assert not untied.tied_head  # transformers 5 reads it there


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
        {"rope_theta": 1e-20},
        {"rope_scaling": {"rope_type": "linear", "factor": 1e20}},
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
        config_from_hf(GEMMA2_27B | change)
    assert len(str(error.value)) > 20


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_new", "quick_gelu", "swish"])
@pytest.mark.parametrize("data", [GEMMA_2B, GEMMA2_27B, GEMMA3_27B], ids=lambda d: d["model_type"])
def test_another_activation_is_refused_by_name(data, activation):
    change = {"hidden_activation": activation}
    if "text_config" in data:
        change = {"text_config": data["text_config"] | change}
    said = f"the activation is '{activation}'; Gemma's is gelu_pytorch_tanh"
    with pytest.raises(ConfigError, match=f"^{said}$"):
        config_from_hf(data | change)


def test_gemma3_with_rope_parameters_of_an_unknown_layer_kind_is_refused():
    with pytest.raises(ConfigError, match="chunked_attention"):
        config_from_hf(GEMMA3_1B | {"rope_parameters": {"chunked_attention": {}}})


def test_multimodal_gemma3_without_a_text_part_is_refused():
    with pytest.raises(ConfigError, match="text_config"):
        config_from_hf({"model_type": "gemma3"})


def test_an_unknown_size_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"known: .*gemma3_270m, .*gemma_2b, gemma_7b"):
        named_config("gemma_3b")


# --- to_dict, to_hf ------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [GEMMA_2B, GEMMA2_27B, GEMMA3_27B], ids=lambda d: d["model_type"])
def test_to_dict_is_json_that_from_dict_reads_back(data):
    config = config_from_hf(data)
    assert GemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


WRITTEN = [
    *(config_from_hf(data) for data in (GEMMA_2B, GEMMA2_27B, GEMMA3_1B, GEMMA3_27B)),
    *(config_from_hf(hf_config(g, tied).to_dict()) for g in GENERATIONS for tied in (True, False)),
    named_config("gemma_7b"),
    named_config("gemma3_270m"),
    named_config("embeddinggemma_300m"),
]  # fmt: skip


@pytest.mark.parametrize("config", WRITTEN)
def test_to_hf_is_json_that_from_hf_and_transformers_read_back(config):
    data = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(data) == config
    theirs = transformers.AutoConfig.for_model(**data)
    assert config_from_hf(theirs.to_dict()) == config


def test_to_hf_writes_round_numbers_as_they_are_published():
    assert config_to_hf(config_from_hf(GEMMA2_27B))["query_pre_attn_scalar"] == 144
    assert config_to_hf(config_from_hf(GEMMA3_27B))["query_pre_attn_scalar"] == 168


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
    config = config_from_hf(hf_config("gemma3").to_dict())
    if callable(edit := change.get("layers")):
        layers = enumerate(config.layers)
        change = {"layers": tuple(dataclasses.replace(s, **edit(s, i)) for i, s in layers)}
    with pytest.raises(ConfigError, match=r"cannot be written as a Hugging Face config\.json"):
        config_to_hf(dataclasses.replace(config, **change))


def test_from_dict_refuses_unknown_missing_and_wrong_entries():
    good = named_config("gemma_2b").to_dict()
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
