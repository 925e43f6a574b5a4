"""Fine-tuning on strings: all weights, and LoRA."""

from __future__ import annotations

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM, open_checkpoint
from gemma_keras.model.layers import GemmaDecoderBlock
from gemma_keras.model.training import train_options
from tests.models import TEXT, shallow, write_tiny_hf

pytestmark = pytest.mark.keras

EOS, BOS = 1, 2
LINES = TEXT.splitlines()
LENGTH = 80  # longer than the longest line
LORA_LAYERS = 2 * 2  # queries and values of two decoder blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_tiny_hf(folder, "gemma2", **shallow("gemma2"))
    return folder


def load(folder):
    keras.utils.set_random_seed(0)
    return GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=LENGTH)


def fit(model, learning_rate):
    model.compile(optimizer=keras.optimizers.Adam(learning_rate))
    history = model.fit(LINES, batch_size=4, epochs=4, shuffle=False, verbose=0)
    return history.history["loss"]


def loss_by_hand(model):
    """Mean cross-entropy of every next token of the lines, end tokens included."""
    tokenizer = model.preprocessor.tokenizer
    token_ids = np.zeros((len(LINES), LENGTH + 1), "int32")
    real = np.zeros(token_ids.shape, "bool")
    for i, line in enumerate(LINES):
        ids = [BOS, *tokenizer(line), EOS]
        token_ids[i, : len(ids)], real[i, : len(ids)] = ids, True
    inputs = {"token_ids": token_ids[:, :-1], "padding_mask": real[:, :-1].astype("int32")}
    logits = ops.convert_to_numpy(model(inputs)).astype("float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probabilities, token_ids[:, 1:, None], axis=-1)[..., 0]
    return -chosen[real[:, 1:]].mean()


def random_ids():
    return np.random.default_rng(0).integers(4, 300, (2, 20)).astype("int32")


def test_the_loss_counts_every_real_token_and_no_padding(folder):
    model = load(folder)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        )
    )
    loss = model.evaluate(LINES, batch_size=len(LINES), verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(loss_by_hand(model), rel=1e-4)


def test_fit_on_strings_lowers_the_loss(folder):
    model = load(folder)
    before = loss_by_hand(model)
    losses = fit(model, learning_rate=3e-3)
    assert losses[-1] < 0.7 * losses[0]
    assert loss_by_hand(model) < 0.7 * before


# --- LoRA ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(folder):
    """A model after LoRA fine-tuning, and what it was before."""
    model = load(folder)
    loss = loss_by_hand(model)
    weights = {name: array.copy() for name, array in model.backbone.weight_source().items()}
    model.backbone.enable_lora(4)
    frozen = [ops.convert_to_numpy(v).copy() for v in model.non_trainable_variables]
    fit(model, learning_rate=1e-2)
    return SimpleNamespace(
        model=model, before=SimpleNamespace(loss=loss, weights=weights, frozen=frozen)
    )


def test_lora_trains_two_small_matrices_of_each_query_and_value(lora):
    names = [variable.name for variable in lora.model.trainable_variables]
    assert sorted(names) == ["lora_kernel_a"] * LORA_LAYERS + ["lora_kernel_b"] * LORA_LAYERS


def test_lora_lowers_the_loss(lora):
    assert loss_by_hand(lora.model) < 0.95 * lora.before.loss


def test_lora_leaves_every_other_weight_alone(lora):
    for variable, old in zip(lora.model.non_trainable_variables, lora.before.frozen, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), old)


def test_weight_source_of_a_lora_model_is_merged(lora):
    weights = lora.model.backbone.weight_source()
    changed = {n for n, old in lora.before.weights.items() if np.abs(weights[n] - old).max() > 1e-3}
    assert changed == {
        f"layers.{i}.attention.{name}"
        for i in range(LORA_LAYERS // 2)
        for name in ("query", "value")
    }
    plain = GemmaBackbone(lora.model.backbone.config, dtype="float32", kernel_initializer="zeros")
    plain.load_weight_source(weights)
    found, expected = GemmaCausalLM(plain).logits(random_ids()), lora.model.logits(random_ids())
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


def test_a_saved_lora_adapter_gives_the_same_logits_when_loaded(lora, folder, tmp_path):
    path = str(tmp_path / "adapter.lora.h5")
    lora.model.backbone.save_lora_weights(path)
    other = load(folder)
    other.backbone.load_lora_weights(path)
    np.testing.assert_array_equal(other.logits(random_ids()), lora.model.logits(random_ids()))


# --- gradient checkpointing ----------------------------------------------------------------------


def weights_after_fit(folder, gradient_checkpointing, dtype="float32"):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(
        folder,
        dtype=dtype,
        sequence_length=LENGTH,
        gradient_checkpointing=gradient_checkpointing,
    )
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    history = model.fit(LINES, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"], dict(model.backbone.weight_source()), model


def test_gradient_checkpointing_changes_no_loss_and_no_gradient(folder):
    """After steps of plain gradient descent, weights differ by their gradients alone."""
    losses, weights, _ = weights_after_fit(folder, False)
    found, others, model = weights_after_fit(folder, True)
    assert model.backbone.gradient_checkpointing
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    start = open_checkpoint(folder).weights
    for name, weight in weights.items():
        moved = np.abs(weight - start[name]).max()
        assert moved > 0, name
        assert np.abs(others[name] - weight).max() < 1e-3 * moved, name
    text = model.generate("the bread", max_length=LENGTH)
    model.backbone.gradient_checkpointing = False
    model.make_generate_function()
    assert model.generate("the bread", max_length=LENGTH) == text


@pytest.mark.backends("tensorflow", "torch")  # JAX records a block once, whatever it runs
def test_gradient_checkpointing_computes_every_block_again(folder, monkeypatch):
    runs = []
    run = GemmaDecoderBlock._run
    monkeypatch.setattr(
        GemmaDecoderBlock, "_run", lambda self, *args: runs.append(self.name) or run(self, *args)
    )
    model = load(folder)
    inputs, targets, _ = model.preprocessor(LINES[:2])
    model.preprocessor = None  # these are ids already
    blocks = sorted(block.name for block in model.backbone.transformer_layers)
    for on in (False, True):
        model.backbone.gradient_checkpointing = on
        model.compile(optimizer="sgd", run_eagerly=True)
        model.train_on_batch(inputs, targets)  # Keras runs the layers once more to build metrics
        runs.clear()
        model.train_on_batch(inputs, targets)
        assert sorted(runs) == sorted(blocks * (2 if on else 1))


@pytest.mark.backends("jax")  # the others do not say what a step will take
def test_gradient_checkpointing_needs_less_memory(tmp_path, record_property):
    import jax

    write_tiny_hf(tmp_path, "gemma2")  # of a few layers there is little to save
    model = load(tmp_path)
    model.compile(optimizer="sgd")
    inputs, _, _ = model.preprocessor(LINES * 4)
    state = [variable.value for variable in model.trainable_variables]

    def memory(on):
        model.backbone.gradient_checkpointing = on

        def loss(state):
            return ops.sum(model.stateless_call(state, [], inputs)[0])

        step = jax.jit(jax.grad(loss), compiler_options=train_options(model))
        return step.lower(state).compile().memory_analysis().temp_size_in_bytes

    without, with_it = memory(False), memory(True)
    record_property("gradient checkpointing, bytes of a step", f"{with_it:,} of {without:,}")
    assert with_it < 0.5 * without


# --- mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)])
def test_mixed_precision(folder, dtype, error):
    exact = load(folder).logits(random_ids())
    model = GemmaCausalLM.from_preset(folder, dtype=dtype, sequence_length=LENGTH)
    assert {v.dtype for v in model.backbone.variables} == {"float32"}
    found = model.logits(random_ids())
    difference = np.sqrt(np.mean(np.square(found - exact))) / exact.std()
    assert 1e-5 < difference < error  # it was computed in 16 bits, and well
    losses = fit(model, learning_rate=3e-3)
    assert np.isfinite(losses).all() and losses[-1] < 0.75 * losses[0]
