"""A model that is saved in the middle of its training goes on as if it had not been."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM
from tests.models import TEXT, shallow, write_tiny_hf

pytestmark = pytest.mark.keras

LINES = TEXT.splitlines()[:4]
LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    write_tiny_hf(folder, "gemma", **shallow("gemma"))
    return folder


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def adam():
    schedule = keras.optimizers.schedules.ExponentialDecay(3e-3, 2, 0.5)
    return keras.optimizers.Adam(schedule, clipnorm=1.0)


def whole(model):
    pass


def lora(model):
    model.backbone.enable_lora(4)


def lora_of_other_layers(model):
    model.backbone.enable_lora(2, target_layer_names=["gate", "attention_output"])


def frozen_blocks(model):
    for block in model.backbone.transformer_layers[:1]:
        block.trainable = False


def checkpointing(model):
    model.backbone.gradient_checkpointing = True


WAYS = {
    "SGD": ("float32", sgd, whole),
    "Adam": ("float32", adam, whole),
    "LoRA": ("float32", adam, lora),
    "LoRA of others": ("float32", sgd, lora_of_other_layers),
    "frozen": ("float32", adam, frozen_blocks),
    "checkpointing": ("float32", sgd, checkpointing),
    "mixed_float16": ("mixed_float16", adam, whole),
    "mixed_bfloat16, LoRA": ("mixed_bfloat16", adam, lora),
}


def fit(model):
    model.fit(LINES, batch_size=2, epochs=1, shuffle=False, verbose=0)


def values(model):
    return [ops.convert_to_numpy(ops.cast(v, "float32")) for v in model.weights]


BACKENDS_CHANGE = ("Adam", "LoRA")  # of the others each backend shows some


@pytest.mark.parametrize(
    "way",
    [w if w in BACKENDS_CHANGE else pytest.param(w, marks=pytest.mark.spread("way")) for w in WAYS],
)
def test_training_goes_on_after_load_model(folder, tmp_path, way):
    dtype, optimizer, prepare = WAYS[way]
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(folder, dtype=dtype, sequence_length=LENGTH)
    prepare(model)
    model.compile(optimizer=optimizer(), sampler="top_p")
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert type(loaded.sampler).__name__ == "TopPSampler"
    assert loaded.backbone.gradient_checkpointing == model.backbone.gradient_checkpointing
    before = values(model)
    for found, expected in zip(values(loaded), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    fit(model)
    fit(loaded)
    changed = False
    for found, expected, old in zip(values(loaded), values(model), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        changed |= bool((expected != old).any())
    assert changed


# Without `compile` the model has a new optimizer, of which Keras says so.
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_lora_that_was_saved_goes_on_learning_and_a_preset_has_it_merged(folder, tmp_path):
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=LENGTH)
    lora(model)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    fit(model)
    expected = model.logits(np.arange(4, 20)[None])
    model.save(tmp_path / "model.keras")
    model.save_to_preset(str(tmp_path / "preset"))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    names = {v.name for v in loaded.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}
    loaded.backbone.save_lora_weights(str(tmp_path / "adapter.lora.h5"))
    merged = GemmaCausalLM.from_preset(tmp_path / "preset", dtype="float32")
    plain = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    for one in (merged, plain):
        assert not any(v.name.startswith("lora") for v in one.weights)
        np.testing.assert_allclose(one.logits(np.arange(4, 20)[None]), expected, atol=1e-4)
    np.testing.assert_array_equal(loaded.logits(np.arange(4, 20)[None]), expected)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_a_model_that_was_never_compiled_is_loaded(folder, tmp_path):
    backbone = GemmaCausalLM.from_preset(folder, dtype="float32").backbone
    model = GemmaCausalLM(backbone, compile=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ids = np.arange(4, 20)[None]
    np.testing.assert_array_equal(loaded.logits(ids), model.logits(ids))


def test_a_model_that_was_never_trained_loads_without_a_warning(folder, tmp_path, recwarn):
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=LENGTH)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not [warning for warning in recwarn if "optimizer" in str(warning.message)]
    fit(loaded)
    assert loaded.optimizer.built
