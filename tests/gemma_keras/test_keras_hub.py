"""KerasHub's own Gemmas, converted to ours and back: logits, weights to the bit, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json

import keras_hub
import numpy as np
import pytest
import torch
import transformers
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM, open_checkpoint
from gemma_keras.errors import CheckpointError, ConfigError
from gemma_keras.keras_hub.convert import read_keras_hub, write_keras_hub
from tests.models import (
    GENERATIONS,
    VOCABULARY_SIZE,
    WINDOW,
    random_ids,
    relative_difference,
    tiny_tokenizer_model,
    write_tiny_hf,
)

pytestmark = pytest.mark.keras
once = pytest.mark.backends("torch")  # what a configuration means, no backend changes

LENGTH = 24
HIDDEN, HEADS, HEAD_DIM = 96, 4, 32
RATIO_SCALE = (HIDDEN // HEADS) ** -0.5  # as the 27B sizes scale queries

COMMON = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_query_heads": HEADS,
    "num_key_value_heads": 2,
    "hidden_dim": HIDDEN,
    "head_dim": HEAD_DIM,
}
POST_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
GEMMA2 = (
    COMMON
    | POST_NORMS
    | {
        "num_layers": 5,
        "intermediate_dim": 320,
        "attention_logit_soft_cap": 2.0,
        "final_logit_soft_cap": 6.0,
        "use_sliding_window_attention": True,
        "sliding_window_size": WINDOW,
    }
)
GEMMA3 = (
    COMMON
    | POST_NORMS
    | {
        "num_layers": 8,
        "image_size": None,
        "intermediate_dim": 160,
        "use_sliding_window_attention": True,
        "sliding_window_size": WINDOW,
        "local_rope_scaling_factor": 2.0,
        "global_rope_scaling_factor": 8.0,
    }
)
RATIO = {"query_head_dim_normalize": False}
MODELS = {
    "gemma": COMMON | {"num_layers": 3, "intermediate_dim": 320},
    "gemma2": GEMMA2,
    "gemma2 as 27B": GEMMA2 | RATIO,
    "gemma3": GEMMA3,
    "gemma3 as 27B": GEMMA3 | RATIO,
    "gemma3 without windows": COMMON
    | POST_NORMS
    | {"num_layers": 2, "image_size": None, "intermediate_dim": 160},
    "gemma3 without norms": GEMMA3
    | {"use_query_key_norm": False}
    | dict.fromkeys(POST_NORMS, False),
}
each_model = pytest.mark.parametrize("kind", MODELS)
each_generation = pytest.mark.parametrize("generation", GENERATIONS)


def backbone_class(kind):
    gemma3 = kind.startswith("gemma3")
    return keras_hub.models.Gemma3Backbone if gemma3 else keras_hub.models.GemmaBackbone


def task(backbone, preprocessor=None):
    gemma3 = isinstance(backbone, keras_hub.models.Gemma3Backbone)
    cls = keras_hub.models.Gemma3CausalLM if gemma3 else keras_hub.models.GemmaCausalLM
    return cls(backbone=backbone, preprocessor=preprocessor)


def randomize(backbone, seed=0):
    """Weights that hide nothing; see `tests.models.tiny_hf`."""
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        noise = rng.standard_normal(variable.shape)
        if variable.path.endswith("scale"):
            final = "final_normalization" in variable.path
            variable.assign(0.4 * noise + (8 if final else 0))
        elif "embedding" in variable.path:
            variable.assign(0.05 * noise)
        else:
            inputs = np.prod(variable.shape[:-1])
            if "attention/attention_output" not in variable.path and len(variable.shape) == 3:
                inputs = variable.shape[1]
            gain = 1.5 if "query" in variable.path or "key" in variable.path else 1.0
            variable.assign(gain * noise / inputs**0.5)


def build(kind, dtype="float32", **others):
    backbone = backbone_class(kind)(**MODELS[kind] | others, dtype=dtype)
    randomize(backbone)
    return backbone


@functools.cache
def made(kind):
    """A KerasHub model that nobody changes, attention told of the 27B's scale."""
    backbone = build(kind)
    for block in backbone.transformer_layers:
        block.attention.query_head_dim_normalize = backbone.query_head_dim_normalize
    return task(backbone)


def logits(model, ids, **others):
    """Of a KerasHub model."""
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)} | others
    return ops.convert_to_numpy(ops.cast(model(inputs), "float32"))


def ours(model):
    return GemmaCausalLM.from_checkpoint(read_keras_hub(model), dtype="float32")


def assert_same_weights(found, expected):
    assert len(found.weights) == len(expected.weights)
    for one, two in zip(found.weights, expected.weights, strict=True):
        assert one.path.split("/")[1:] == two.path.split("/")[1:]
        np.testing.assert_array_equal(
            *(ops.convert_to_numpy(ops.cast(v, "float32")) for v in (one, two)), err_msg=one.path
        )


def settings(backbone):
    """What KerasHub saves of a backbone, its name aside."""
    return {k: v for k, v in backbone.get_config().items() if k != "name"}


# --- read ----------------------------------------------------------------------------------------


@each_model
def test_logits_are_those_of_the_keras_hub_model(kind, record_property):
    ids = random_ids()
    expected = logits(made(kind), ids)
    difference = relative_difference(ours(made(kind)).logits(ids), expected)
    record_property(f"KerasHub {kind} logits, greatest difference / spread", f"{difference:.1e}")
    assert difference < 1e-4


@once
@each_model
def test_what_is_read_says_every_size_and_scale(kind):
    config, asked = read_keras_hub(made(kind)).config, MODELS[kind]
    assert len(config.layers) == asked["num_layers"]
    assert config.layers[0].ffw_dim == 160
    by_head_dim = asked.get("query_head_dim_normalize", True)
    assert config.layers[0].query_scale == (HEAD_DIM**-0.5 if by_head_dim else RATIO_SCALE)
    assert config.layers[0].post_norms == asked.get("use_post_ffw_norm", False)
    assert config.final_soft_cap == asked.get("final_logit_soft_cap")
    assert config.norm_epsilon == 1e-6
    contexts = {1.0: 32_768, 8.0: 131_072} if kind.startswith("gemma3") else {1.0: 8192}
    assert config.context_length == contexts[asked.get("global_rope_scaling_factor", 1.0)]
    scales = [(s.sliding_window, s.rope_theta, s.rope_scale) for s in config.layers]
    if asked.get("use_sliding_window_attention") and kind.startswith("gemma3"):
        local, full = (WINDOW, 10_000.0, 2.0), (None, 1_000_000.0, 8.0)
        assert scales == [local] * 5 + [full] + [local] * 2


@pytest.mark.parametrize("kind", ["gemma2 as 27B", "gemma3 as 27B"])
def test_a_27b_is_scaled_as_it_was_trained_although_keras_hub_does_not_tell_attention(kind):
    backbone = build(kind)
    assert read_keras_hub(backbone).config == read_keras_hub(made(kind)).config


def test_a_bare_backbone_is_read_as_the_task_is():
    alone, whole = read_keras_hub(made("gemma2").backbone), read_keras_hub(made("gemma2"))
    assert alone.config == whole.config
    assert alone.tokenizer_model is None
    assert list(alone.weights) == list(whole.weights)
    for name, array in whole.weights.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(alone.weights[name], array)


def test_what_keras_hub_does_not_say_can_be_told():
    checkpoint = read_keras_hub(made("gemma"), instruction_tuned=True, context_length=4096)
    assert checkpoint.instruction_tuned
    assert checkpoint.config.context_length == 4096


@pytest.mark.spread
@each_generation
def test_lora_is_merged(generation):
    backbone = build(generation)
    before = logits(task(backbone), random_ids())
    backbone.enable_lora(3, ["query", "value", "attention_output", "ffw_gating", "token_embedding"])
    rng = np.random.default_rng(2)
    for layer in backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            layer.lora_alpha = 5
    for variable in backbone.trainable_weights:
        size = 0.01 if "embedding" in variable.path else 0.1
        variable.assign(size * rng.standard_normal(variable.shape))
    ids = random_ids()
    expected = logits(task(backbone), ids)
    assert relative_difference(expected, before) > 0.1
    assert relative_difference(ours(backbone).logits(ids), expected) < 1e-4
    back = write_keras_hub(read_keras_hub(backbone), dtype="float32")
    assert relative_difference(logits(back, ids), expected) < 1e-5


@once
def test_of_a_model_with_vision_the_text_part_is_read():
    encoder = keras_hub.models.Gemma3VisionEncoder(
        image_size=16, patch_size=4, num_heads=2, hidden_dim=8, num_layers=1, intermediate_dim=8,
        output_dim=HIDDEN, pool_size=2, dtype="float32",
    )  # fmt: skip
    backbone = build("gemma3", vision_encoder=encoder, image_size=16, num_layers=1)
    model = ours(task(backbone))
    ids = random_ids(2)
    expected = logits(
        task(backbone),
        ids,
        # KerasHub runs an image in any case, and then puts it nowhere: index 0 keeps its text.
        images=np.zeros((2, 1, 16, 16, 3), "float32"),
        vision_indices=np.zeros((2, 4), "int32"),
        vision_mask=np.zeros_like(ids),
    )
    assert relative_difference(model.logits(ids), expected) < 1e-4


# --- write ---------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.spread("kind")), "bfloat16"]
)
def test_through_our_model_and_back_every_weight_has_its_bits(kind, dtype):
    backbone = build(kind, dtype)
    back = GemmaCausalLM.from_keras_hub(backbone, dtype=dtype).to_keras_hub(dtype)
    assert type(back) is type(task(backbone))
    assert settings(back.backbone) == settings(backbone)
    assert_same_weights(back.backbone, backbone)
    if dtype == "float32":
        ids = random_ids()
        np.testing.assert_array_equal(logits(back, ids), logits(made(kind), ids))


# What KerasHub has built in, in the words of a config.json.
ROPES = {
    "gemma": {"rope_type": "default", "rope_theta": 10_000.0},
    "gemma2": {"rope_type": "default", "rope_theta": 10_000.0},
    "gemma3": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}


def write_hf(folder, generation, **others):
    """A small Hugging Face folder that KerasHub can express, unless `others` say it cannot."""
    write_tiny_hf(folder, generation)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"rms_norm_eps": 1e-6, "rope_parameters": ROPES[generation]}
    if generation != "gemma":
        config["query_pre_attn_scalar"] = HIDDEN // HEADS
    path.write_text(json.dumps(config | others))
    return open_checkpoint(folder)


@pytest.mark.spread
@each_generation
def test_a_hugging_face_model_has_its_logits_in_keras_hub(generation, tmp_path, record_property):
    model = write_keras_hub(write_hf(tmp_path, generation), dtype="float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    ids = random_ids()
    with torch.no_grad():
        expected = reference(torch.tensor(ids, dtype=torch.int64)).logits.numpy()
    difference = relative_difference(logits(model, ids), expected)
    record_property(
        f"{generation} in KerasHub against transformers, greatest difference / spread",
        f"{difference:.1e}",
    )
    assert difference < 1e-4


@pytest.mark.spread
@each_generation
def test_the_tokenizer_goes_there_and_back(generation, tmp_path):
    model = write_keras_hub(write_hf(tmp_path, generation), dtype="float32")
    checkpoint = read_keras_hub(model)
    assert checkpoint.tokenizer_model == tiny_tokenizer_model()
    text = ["Seven small stones"]
    theirs = model.preprocessor.generate_preprocess(text, sequence_length=LENGTH)
    here = GemmaCausalLM.from_checkpoint(checkpoint, load_weights=False).preprocessor
    here = here.generate_preprocess(text, sequence_length=LENGTH)
    for key in ("token_ids", "padding_mask"):
        np.testing.assert_array_equal(*(ops.convert_to_numpy(x[key]) for x in (theirs, here)))


def test_both_go_on_with_the_same_words(tmp_path):
    model = write_keras_hub(write_hf(tmp_path, "gemma"), dtype="float32")
    assert model.generate("the bread", max_length=16) == ours(model).generate(
        "the bread", max_length=16
    )


# --- what is refused -----------------------------------------------------------------------------


def mixed_epsilons():
    return build("gemma2", layer_norm_epsilon=1e-5)


def an_inherited_class():
    class Other(keras_hub.models.GemmaBackbone):
        pass

    return Other(**MODELS["gemma"])


def another_rope():
    backbone = build("gemma")
    backbone.transformer_layers[1].attention.rope_layer.rope_type = "yarn"
    return backbone


def unread(**others):
    return lambda: build("gemma3", **others)


@once
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mixed_epsilons, "decoder_block_0.pre_attention_norm .* has the epsilon 1e-06"),
        (an_inherited_class, "Other is not supported; give a keras_hub"),
        (
            lambda: GemmaBackbone(read_keras_hub(made("gemma")).config),
            "is not supported; give a keras_hub",
        ),
        (lambda: "gemma_2b_en", "builtins.str is not supported; give a keras_hub"),
        (another_rope, "decoder_block_1 .* RoPE of type 'yarn'"),
        (unread(use_bidirectional_attention=True), "bidirectional attention"),
        (unread(use_post_ffw_norm=False), "use_post_ffw_norm=False"),
        (
            unread(is_embedding_model=True, pooling_intermediate_dim=8, embedding_dim=8),
            "embeds texts",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mathematics_that_a_gemma_does_not_have_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        read_keras_hub(make())


def test_epsilons_that_were_made_to_agree_are_read():
    backbone = mixed_epsilons()
    backbone.layer_norm.epsilon = 1e-6
    assert read_keras_hub(backbone).config.norm_epsilon == 1e-6


# On torch Keras transposes a vector of scales.
@pytest.mark.filterwarnings("ignore:[\\s\\S]*The use of `x.T` on tensors:UserWarning")
@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_a_quantized_model_is_refused(mode):
    backbone = build("gemma")
    backbone.transformer_layers[1].attention.key_dense.quantize(mode)
    with pytest.raises(CheckpointError, match=f"key .* quantized to {mode}; convert the model"):
        read_keras_hub(task(backbone))


@once
def test_weights_that_a_gemma_does_not_have_are_refused():
    backbone = build("gemma")
    layer = backbone.transformer_layers[2].gating_ffw
    layer._tracker.unlock()
    layer.add_weight(name="bias", shape=(160,))
    with pytest.raises(CheckpointError, match="one of its parts is not supported"):
        read_keras_hub(backbone)


def changed(config, layer=None, **fields):
    """The configuration with fields of one layer, or its own, changed."""
    if layer is None:
        return dataclasses.replace(config, **fields)
    layers = list(config.layers)
    layers[layer] = dataclasses.replace(layers[layer], **fields)
    return dataclasses.replace(config, layers=tuple(layers))


@once
@pytest.mark.parametrize(
    ("kind", "layer", "fields"),
    [
        ("gemma", None, {"tied_head": False}),
        ("gemma", None, {"norm_epsilon": 1e-5}),
        ("gemma", None, {"embedding_scale": 10.0}),
        ("gemma", 0, {"query_scale": 0.2}),
        ("gemma", 1, {"rope_theta": 500.0}),
        ("gemma", 0, {"sliding_window": WINDOW}),
        ("gemma2", 2, {"sliding_window": None}),
        ("gemma2", 1, {"attention_soft_cap": 3.0}),
        ("gemma2", 4, {"ffw_dim": 64}),
        ("gemma3", 5, {"sliding_window": WINDOW}),
        ("gemma3", 7, {"rope_scale": 1.0}),
        ("gemma3", 5, {"rope_theta": 10_000.0}),
        ("gemma3", 3, {"num_kv_heads": 1}),
    ],
)
def test_what_keras_hub_cannot_express_is_named(kind, layer, fields):
    checkpoint = read_keras_hub(made(kind))
    checkpoint = dataclasses.replace(
        checkpoint, config=changed(checkpoint.config, layer, **fields), weights={}
    )
    (name,) = fields
    path = name if layer is None else rf"layers\.\d\.{name}"
    with pytest.raises(ConfigError, match=f"cannot express this architecture: {path} is "):
        write_keras_hub(checkpoint)


@once
def test_a_tokenizer_without_the_control_tokens_is_refused():
    model = tiny_tokenizer_model().replace(b"<bos>", b"<BOS>")
    checkpoint = dataclasses.replace(read_keras_hub(made("gemma")), tokenizer_model=model)
    with pytest.raises(CheckpointError, match=r"KerasHub cannot load the tokenizer: .*<bos>"):
        write_keras_hub(checkpoint)


@once
def test_missing_and_misshapen_weights_are_refused():
    checkpoint = read_keras_hub(made("gemma"))
    weights = dict(checkpoint.weights)
    del weights["layers.1.mlp.up"]
    with pytest.raises(CheckpointError, match=r"lack layers\.1\.mlp\.up"):
        write_keras_hub(dataclasses.replace(checkpoint, weights=weights))
    weights = dict(checkpoint.weights) | {"final_norm": np.zeros(95, "float32")}
    with pytest.raises(CheckpointError, match="final_norm has shape"):
        write_keras_hub(dataclasses.replace(checkpoint, weights=weights))
