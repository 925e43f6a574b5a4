"""Arguments of `from_preset`, `generate` and `quantize` change what they say."""

from __future__ import annotations

import dataclasses
import warnings

import keras
import numpy as np
import pytest

from gemma_keras import GemmaBackbone, GemmaCausalLM
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer
from tests.models import chat_tokenizer_model, shallow, write_tiny_hf

pytestmark = pytest.mark.keras
once = pytest.mark.backends("torch")  # what an argument means, no backend changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    write_tiny_hf(folder, "gemma", **shallow("gemma"))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=40)


@pytest.fixture(scope="module")
def preset(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "own"
    model.save_to_preset(str(path))
    return path


# --- from_preset ---------------------------------------------------------------------------------


def what_was_loaded(model):
    return {
        "sequence_length": model.preprocessor.sequence_length,
        "packed": model.preprocessor("A")[0]["token_ids"].shape[-1],
        "gradient_checkpointing": model.backbone.gradient_checkpointing,
        "dtype": model.backbone.dtype_policy.name,
        "instruction_tuned": model.instruction_tuned,
        "provenance": model.provenance.get("name"),
    }


def test_every_argument_counts_for_a_folder_of_save_to_preset(preset):
    kept = what_was_loaded(GemmaCausalLM.from_preset(preset, dtype="float32"))
    assert (kept["sequence_length"], kept["packed"], kept["dtype"]) == (40, 40, "float32")
    assert not kept["gradient_checkpointing"] and not kept["instruction_tuned"]
    other = GemmaCausalLM.from_preset(
        preset,
        dtype="bfloat16",
        sequence_length=12,
        gradient_checkpointing=True,
        instruction_tuned=True,
        provenance={"name": "mine"},
    )
    assert what_was_loaded(other) == {
        "sequence_length": 12,
        "packed": 12,
        "gradient_checkpointing": True,
        "dtype": "bfloat16",
        "instruction_tuned": True,
        "provenance": "mine",
    }
    assert "mine" not in str(kept["provenance"])


def test_what_was_saved_with_gradient_checkpointing_can_be_loaded_without(folder, tmp_path):
    model = GemmaCausalLM.from_preset(folder, gradient_checkpointing=True, dtype="float32")
    model.save_to_preset(str(tmp_path))
    assert GemmaCausalLM.from_preset(tmp_path).backbone.gradient_checkpointing
    without = GemmaCausalLM.from_preset(tmp_path, gradient_checkpointing=False)
    assert not without.backbone.gradient_checkpointing


def test_without_load_weights_they_are_random(model, preset, folder):
    name = "layers.0.mlp.up"
    expected = model.backbone.weight_source()[name]
    for source in (preset, folder):
        found = GemmaCausalLM.from_preset(source, load_weights=False, dtype="float32")
        assert np.abs(found.backbone.weight_source()[name] - expected).max() > 0.01


@once
def test_a_folder_without_a_tokenizer_is_told_and_works_on_token_ids(folder, tmp_path):
    write_tiny_hf(tmp_path, "gemma", **shallow("gemma"))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.warns(
        UserWarning, match="has no tokenizer, so generate, stream, chat and fit accept"
    ):
        bare = GemmaCausalLM.from_preset(tmp_path, dtype="float32")
    ids = np.arange(4, 20)[None]
    inputs = {"token_ids": ids, "padding_mask": np.arange(16)[None] < 9}
    found = bare.generate(inputs, stop_token_ids=None)["token_ids"]
    assert (found[0, :9] == ids[0, :9]).all() and (found[0, 9:] != ids[0, 9:]).any()
    given = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    bare.fit(given, y=ids, shuffle=False, verbose=0)
    for call in (lambda: bare.stream("A"), lambda: bare.chat("A")):
        with pytest.raises(ValueError, match="needs a preprocessor"):
            list(call())


# --- fit -----------------------------------------------------------------------------------------


def test_what_fit_is_given_counts(folder):
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=12)
    metric = keras.metrics.SparseCategoricalAccuracy(name="mine")
    model.compile(optimizer=keras.optimizers.SGD(0.0), weighted_metrics=[metric])
    lines = ["The boat", "A stone"]
    inputs, targets, weights = (
        np.concatenate(
            [
                np.asarray(
                    model.preprocessor(line)[i][key] if key else model.preprocessor(line)[i]
                )[None]
                for line in lines
            ]
        )
        for i, key in ((0, "token_ids"), (1, None), (2, None))
    )
    bare = GemmaCausalLM(model.backbone)
    bare.compile(optimizer=keras.optimizers.SGD(0.0), weighted_metrics=[metric])
    x = {"token_ids": inputs, "padding_mask": np.ones_like(inputs)}
    losses = {
        name: bare.fit(x, targets, shuffle=False, verbose=0, **given).history
        for name, given in {
            "all": {},
            "real": {"sample_weight": weights},
            "validated": {"validation_data": (x, targets, weights)},
            "split": {"validation_split": 0.5},
        }.items()
    }
    assert losses["all"]["loss"] != losses["real"]["loss"]
    assert losses["validated"]["val_loss"][0] == pytest.approx(losses["real"]["loss"][0], rel=1e-4)
    assert "val_loss" in losses["split"] and "mine" in losses["all"]


# --- KerasHub ------------------------------------------------------------------------------------


def test_a_live_model_of_keras_hub_is_what_is_said_of_it(model):
    config = model.backbone.config  # but for what KerasHub's has fixed
    layers = tuple(dataclasses.replace(layer, rope_theta=10_000.0) for layer in config.layers)
    config = dataclasses.replace(config, layers=layers, norm_epsilon=1e-6)
    ours = GemmaCausalLM(
        GemmaBackbone(config, dtype="float32"),
        GemmaCausalLMPreprocessor(GemmaTokenizer(proto=chat_tokenizer_model())),
    )
    assert ours.to_keras_hub(dtype="float32").backbone.dtype_policy.name == "float32"
    theirs = ours.to_keras_hub(dtype="bfloat16")
    assert theirs.backbone.dtype_policy.name == "bfloat16"
    back = GemmaCausalLM.from_keras_hub(
        theirs, instruction_tuned=True, dtype="mixed_bfloat16", sequence_length=17
    )
    found = what_was_loaded(back)
    assert (found["instruction_tuned"], found["dtype"]) == (True, "mixed_bfloat16")
    assert found["sequence_length"] == 17


# --- generate ------------------------------------------------------------------------------------


@once
@pytest.mark.parametrize(
    ("prompt", "which", "count"),
    [
        ("The gardener waters", "the prompt", 0),
        (["A", "The gardener waters", "B"], "prompt 1 of 3", 1),
        (np.array(["A", "The gardener waters"]), "prompt 1 of 2", 1),
    ],
    ids=["one", "batch", "array"],
)
def test_a_prompt_is_never_cut(model, prompt, which, count):
    text = prompt if isinstance(prompt, str) else str(prompt[count])
    tokens = 1 + len(model.preprocessor.tokenizer(text))
    said = rf"^{which} has {tokens} tokens, which leaves no room for an answer within {tokens};"
    with pytest.raises(ValueError, match=said):
        model.generate(prompt, max_length=tokens)
    with pytest.raises(ValueError, match=rf"^{which} has {tokens} tokens.* within 3;"):
        model.generate(prompt, max_length=3)
    found = model.generate(prompt, max_length=tokens + 1, stop_token_ids=None)
    assert len(found) == (len(found) if isinstance(prompt, str) else len(prompt))
    with pytest.raises(ValueError, match="max_length=0"):
        list(model.stream(text, max_length=0))


@once
def test_a_prompt_beyond_the_sequence_length_is_never_cut(model):
    with pytest.raises(ValueError, match=r"within 40; give a larger max_length"):
        model.generate("The gardener waters the young trees " * 9)


def test_without_a_preprocessor_max_length_is_refused(model):
    ids = np.arange(4, 20)[None]
    bare = GemmaCausalLM(model.backbone)
    inputs = {"token_ids": ids, "padding_mask": np.arange(16)[None] < 9}
    with pytest.raises(ValueError, match="max_length=12 needs a preprocessor"):
        bare.generate(inputs, max_length=12, stop_token_ids=None)


def test_strip_prompt_and_stops(model):
    whole = model.generate("The boat", max_length=30, stop_token_ids=None)
    assert whole.startswith("The boat")
    after = model.generate("The boat", max_length=30, stop_token_ids=None, strip_prompt=True)
    assert not after.startswith("The boat") and whole.endswith(after)
    prompt = [2, *model.preprocessor.tokenizer("The boat")]
    stop = list(model.make_generate_function().stream(prompt, 30))[3]
    assert len(model.generate("The boat", max_length=30, stop_token_ids=[stop])) < len(whole)


# --- quantize ------------------------------------------------------------------------------------

# mode: what of the logits' spread it may lose
MODES = {"int8": 0.1, "int4": 0.9, "float8": 0.2}


@pytest.mark.parametrize(
    "mode",
    ["int8", *(pytest.param(m, marks=pytest.mark.spread("mode")) for m in MODES if m != "int8")],
)
def test_a_model_that_has_not_been_run_is_quantized(folder, model, mode):
    fresh = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=40)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fresh.quantize(mode)
    messages = [str(one.message) for one in told]
    assert sum("the token embedding" in m for m in messages) == (mode != "float8")
    assert not any("`quantize` method" in m for m in messages)
    ids = np.arange(4, 24)[None]
    expected = model.logits(ids)
    difference = np.sqrt(np.mean((fresh.logits(ids) - expected) ** 2)) / expected.std()
    assert 1e-4 < difference < MODES[mode]
    assert fresh.generate("The boat", max_length=20).startswith("The boat")
    modes = {layer.quantization_mode for layer in fresh.backbone.transformer_layers[0].mlp._layers}
    assert modes == {mode}
    weights = fresh.backbone.weight_source()
    assert weights.keys() == weight_specs(fresh.backbone.config).keys()
    assert np.isfinite(weights["layers.0.mlp.up"]).all()


@once
def test_filters_choose_the_layers_that_are_quantized(folder):
    fresh = GemmaCausalLM.from_preset(folder, dtype="float32")
    fresh.quantize("int8", filters=["query", "key"])
    fresh.quantize("int4", filters=lambda layer: layer.name == "up")
    block = fresh.backbone.transformer_layers[1]
    names = ("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down")
    found = [block.sublayer(name).quantization_mode for name in names]
    assert found == ["int8", "int8", None, "int4", None]
    table = fresh.backbone.token_embedding
    fresh.quantize("float8", filters=["down", "token_embedding"])  # Keras has none of tables
    assert block.sublayer("mlp.down").quantization_mode == "float8"
    assert table.quantization_mode is None
    fresh.quantize("int8", filters="token_embedding")
    assert table.quantization_mode == "int8"
    with pytest.warns(UserWarning, match="the filters choose no layer"):
        fresh.quantize("int8", filters="qeury")


@once
def test_integer_products_in_float16_are_refused(folder):
    fresh = GemmaCausalLM.from_preset(folder, dtype="mixed_float16")
    with pytest.raises(ValueError, match="'int8' doesn't work well with compute_dtype='float16'"):
        fresh.quantize("int8")


def test_lora_on_a_quantized_model_survives_saving(folder, tmp_path):
    fresh = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=40)
    fresh.quantize("int8", type_check=False)
    assert fresh.backbone.token_embedding.quantization_mode == "int8"
    fresh.backbone.enable_lora(2)
    fresh.compile(optimizer=keras.optimizers.Adam(1e-2))
    fresh.fit(["The boat", "A stone"], shuffle=False, verbose=0)
    fresh.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ids = np.arange(4, 24)[None]
    np.testing.assert_array_equal(loaded.logits(ids), fresh.logits(ids))
