"""LoRA in a model's layers: what it adds, several adapters by name, a quantized base."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM
from gemma_keras.errors import CheckpointError
from gemma_keras.model import lora
from tests.gemma_keras.lora_models import IDS, LENGTH, adapted, by_hand, fill, load, near, quiet
from tests.models import TEXT, shallow, write_tiny_hf

pytestmark = pytest.mark.keras

LINES = TEXT.splitlines()
ALL_LINEAR = 7  # matrices of a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_hf(folder, "gemma3", **shallow("gemma3"))
    return folder


# --- what they add -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": None},
        {"targets": ["q_proj", "down"]},
        {"targets": "layers.1.mlp.up"},
        {"alpha": None},
        {"rslora": True},
    ],
    ids=str,
)
def test_the_scaled_product_is_added(folder, options):
    model = adapted(folder, **options)
    base = load(folder).logits(IDS)
    near(model.logits(IDS), by_hand(model))
    assert np.abs(model.logits(IDS) - base).max() > 0.1 * base.std()
    rank, alpha = 3, {"alpha": None}.get("alpha", 5) if "alpha" in options else 5
    scale = 1 if alpha is None else alpha / (np.sqrt(rank) if options.get("rslora") else rank)
    layer = next(one for one in lora.layers_of(model.backbone).values() if one.has_lora)
    assert layer.lora_alpha / layer.lora_rank == pytest.approx(scale)


def test_a_new_adapter_changes_nothing_and_is_all_that_learns(folder):
    model = load(folder)
    base = model.logits(IDS)
    model.enable_lora(rank=2, targets="all-linear")
    np.testing.assert_array_equal(model.logits(IDS), base)
    assert len(model.trainable_variables) == 2 * 2 * ALL_LINEAR
    frozen = [ops.convert_to_numpy(v).copy() for v in model.non_trainable_variables]
    history = model.fit(LINES, batch_size=4, epochs=3, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    for variable, old in zip(model.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), old)
    with model.without_adapter():
        np.testing.assert_array_equal(model.logits(IDS), base)


def test_dropout_is_of_training_alone_and_leaves_the_mean(folder):
    model = adapted(folder, targets="q_proj", dropout=0.5)
    expected = model.logits(IDS)
    near(expected, by_hand(model))
    layer = model.backbone.transformer_layers[0].attention.query
    x = np.ones((4000, 96), "float32")
    outputs = [ops.convert_to_numpy(layer(x, training=on)) for on in (True, False)]
    assert outputs[0].std(axis=0).min() > 0.01 and outputs[1].std(axis=0).max() < 1e-3
    assert np.abs(outputs[0].mean(0) - outputs[1][0]).max() < 0.1 * outputs[1][0].std()
    losses = [model.fit(LINES, epochs=1, shuffle=False, verbose=0).history["loss"][0]]
    assert np.isfinite(losses).all()


def test_lora_beside_weights_of_16_bits_keeps_their_dtype(folder):
    """Queries and values have LoRA, and keys have not: attention wants one dtype."""
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(folder, dtype="bfloat16", sequence_length=LENGTH)
    model.enable_lora(rank=2)
    model.compile(keras.optimizers.Adam(1e-2))
    fill(model)
    query = model.backbone.transformer_layers[0].attention.query
    assert keras.backend.standardize_dtype(query(np.ones((1, 3, 96))).dtype) == "bfloat16"
    history = model.fit(LINES, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.backends("torch")
def test_dropout_on_quantized_weights(folder):
    model = load(folder)
    with pytest.warns(UserWarning, match="the token embedding is not quantized"):
        model.quantize("int8")
    model.enable_lora(rank=2, dropout=0.5)
    fill(model)
    expected = model.logits(IDS)
    layer = model.backbone.transformer_layers[0].attention.query
    x = np.ones((50, 96), "float32")
    assert ops.convert_to_numpy(layer(x, training=True)).std(axis=0).min() > 0.001
    assert ops.convert_to_numpy(layer(x, training=False)).std(axis=0).max() < 1e-5
    np.testing.assert_array_equal(model.logits(IDS), expected)
    with pytest.raises(ValueError, match="cannot be merged into quantized weights"):
        model.merge_lora()


def test_merged_it_is_in_the_weights_and_comes_out_again(folder):
    model = adapted(folder)
    expected, base = model.logits(IDS), load(folder).logits(IDS)
    text = model.generate("the boat", max_length=30)
    model.merge_lora()
    assert model.active_adapter == "default"
    near(model.logits(IDS), expected)
    assert model.generate("the boat", max_length=30) == text
    for refused in (
        model.merge_lora,
        lambda: model.set_adapter(None),
        lambda: model.enable_lora(name="other"),
    ):
        with pytest.raises(ValueError, match="call unmerge_lora first"):
            refused()
    model.unmerge_lora()
    near(model.logits(IDS), expected)
    with model.without_adapter():
        near(model.logits(IDS), base)


# --- several -------------------------------------------------------------------------------------


def test_adapters_are_switched_without_loading(folder):
    model = load(folder)
    expected = {None: model.logits(IDS)}
    texts = {None: model.generate("the boat", max_length=40)}
    for seed, (name, rank, targets) in enumerate(
        [("one", 2, None), ("same shape", 2, None), ("wider", 4, "all-linear")]
    ):
        model.enable_lora(rank=rank, targets=targets, name=name)
        fill(model, seed)
        expected[name] = model.logits(IDS)
        texts[name] = model.generate("the boat", max_length=40)
    assert model.adapters == ("one", "same shape", "wider")
    for name in ("one", None, "wider", "same shape", "one", None):
        model.set_adapter(name)
        assert model.active_adapter == name
        np.testing.assert_array_equal(model.logits(IDS), expected[name])
        assert model.generate("the boat", max_length=40) == texts[name]
    model.set_adapter("same shape")
    before = model.fit(LINES, epochs=2, verbose=0).history["loss"]
    model.set_adapter("wider")
    model.fit(LINES, epochs=1, verbose=0)
    model.set_adapter("one")
    np.testing.assert_array_equal(model.logits(IDS), expected["one"])
    model.set_adapter("same shape")
    assert model.evaluate(LINES, verbose=0, return_dict=True)["loss"] < before[0]
    model.delete_adapter("wider")
    model.delete_adapter("same shape")
    assert model.adapters == ("one",) and model.active_adapter is None
    np.testing.assert_array_equal(model.logits(IDS), expected[None])
    assert len(model.trainable_variables) == len(load(folder).trainable_variables)


def test_an_adapter_goes_on_learning_after_load_model(folder, tmp_path):
    model = adapted(folder, targets="q_proj")
    model.fit(LINES, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.logits(IDS), model.logits(IDS))
    assert loaded.adapters == ("default",)
    loaded.fit(LINES, verbose=0)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_that_is_not_in_use_or_merged_is_saved_as_it_is(folder, merged, tmp_path):
    model = adapted(folder, targets="q_proj", dropout=0.25, rslora=True, name="mine")
    model.fit(LINES, verbose=0)
    on = model.logits(IDS)
    model.merge_lora() if merged else model.set_adapter(None)
    now = model.logits(IDS)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.logits(IDS), now)
    assert loaded.adapters == ("mine",)
    assert loaded.active_adapter == ("mine" if merged else None)
    for one in (model, loaded):
        said = "is merged, so that it cannot learn" if merged else "no adapter is in use"
        with pytest.raises(ValueError, match=said):
            one.fit(LINES, verbose=0)
        one.unmerge_lora() if merged else one.set_adapter("mine")
        near(one.logits(IDS), on)
        assert lora.values_of(one.backbone).dropout == 0.25
    weights = [one.trainable_variables[0] for one in (model, loaded)]
    model.fit(LINES, verbose=0)
    loaded.fit(LINES, verbose=0)
    moved = [np.abs(ops.convert_to_numpy(one)).max() for one in weights]
    assert all(moved) and len(loaded.variables) == len(model.variables)


@pytest.mark.backends("torch")
def test_adapters_that_are_not_saved_with_the_model_are_named(folder, tmp_path):
    model = adapted(folder, name="one")
    model.enable_lora(rank=2, name="two")
    with pytest.warns(UserWarning, match="only 'two' is saved .*; save_adapter writes 'one'"):
        model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").adapters == ("two",)


@pytest.mark.backends("torch")
def test_an_adapter_that_is_deleted_leaves_nothing(folder, tmp_path):
    model, fresh = load(folder), load(folder)
    model.enable_lora(rank=2, dropout=0.5)
    model.fit(LINES, verbose=0)
    model.delete_adapter("default")
    assert [v.path for v in model.variables] == [v.path for v in fresh.variables]
    assert [v.trainable for v in model.variables] == [v.trainable for v in fresh.variables]
    model.fit(LINES, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.logits(IDS), model.logits(IDS))


@pytest.mark.backends("torch")
def test_lora_keeps_the_loss_and_the_settings_of_the_optimizer(folder):
    def loss(targets, logits):
        return ops.mean(keras.losses.sparse_categorical_crossentropy(targets, logits, True))

    model = load(folder)
    model.compile(optimizer=keras.optimizers.Adam(3e-3, clipnorm=0.5), loss=loss)
    model.enable_lora(rank=2)
    assert model.loss is loss and model.optimizer.clipnorm == 0.5
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(3e-3)
    history = model.fit(LINES, batch_size=2, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.backends("torch")
def test_lora_of_the_embedding_is_not_left_out_of_an_adapter(folder, tmp_path):
    model = load(folder)
    model.backbone.enable_lora(2, ["query", "token_embedding"])
    with pytest.raises(ValueError, match="LoRA of the embedding cannot be saved as an adapter"):
        model.save_adapter(tmp_path / "adapter")


@pytest.mark.backends("torch")
def test_kerashubs_way_still_works(folder, tmp_path):
    model = load(folder)
    model.backbone.enable_lora(2)
    fill(model)
    assert model.adapters == ("default",)
    model.backbone.save_lora_weights(str(tmp_path / "a.lora.h5"))
    other = load(folder)
    other.enable_lora(rank=2)
    other.backbone.load_lora_weights(str(tmp_path / "a.lora.h5"))
    np.testing.assert_array_equal(other.logits(IDS), model.logits(IDS))
    with pytest.raises(
        CheckpointError, match=r"a\.lora\.h5 is not an adapter: .*load_lora_weights"
    ):
        load(folder).load_adapter(tmp_path / "a.lora.h5")


@pytest.mark.backends("torch")
def test_what_cannot_be_is_refused(folder):
    model = load(folder)
    for options, said in (
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"rank": 2.0}, r"rank is 2\.0; it must be"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a number"),
        ({"dropout": 1}, "dropout is 1; it must be 0 or more"),
        ({"targets": ["query", "qkv"]}, "no target 'qkv'; choose of down, gate, key, output"),
        ({"targets": []}, "no target at all"),
    ):
        with pytest.raises(ValueError, match=said):
            model.enable_lora(**options)
    for refused in (model.merge_lora, model.save_adapter):
        with pytest.raises(ValueError, match="there is no "):
            refused(*(["x"] if refused == model.save_adapter else []))
    assert model.adapters == () and model.active_adapter is None
    model.enable_lora()
    with pytest.raises(ValueError, match="an adapter 'default' already"):
        model.enable_lora()
    with pytest.raises(ValueError, match="no adapter 'other'; there are: default"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.delete_adapter("other")
    with pytest.raises(ValueError, match="no adapter is merged"):
        model.unmerge_lora()
    with pytest.raises(ValueError, match="cannot be used with gradient_checkpointing"):
        load(folder, gradient_checkpointing=True).enable_lora(dropout=0.1)


# --- QLoRA ---------------------------------------------------------------------------------------


def quantized(folder, mode):
    model = load(folder)
    with quiet():  # the table comes next
        model.quantize(mode)
    model.quantize("int8", filters="token_embedding")
    return model


@pytest.mark.parametrize("mode", [pytest.param("int8", marks=pytest.mark.spread("mode")), "int4"])
def test_a_quantized_base_is_not_changed_and_its_adapter_is_kept_apart(folder, mode, tmp_path):
    model = quantized(folder, mode)
    base = {name: np.array(array) for name, array in model.backbone.weight_source().items()}
    model.enable_lora(rank=4, targets="all-linear")
    losses = model.fit(LINES, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    with model.without_adapter():
        for name, array in model.backbone.weight_source().items():
            np.testing.assert_array_equal(array, base[name])
    model.save_adapter(tmp_path / "adapter")
    other = quantized(folder, mode)
    other.load_adapter(tmp_path / "adapter")
    np.testing.assert_array_equal(other.logits(IDS), model.logits(IDS))
    # what is exported has the product added in float, and is not rounded to the old grid
    pairs = lora.values_of(model.backbone).pairs
    exported = model.backbone.weight_source()
    for name, pair in pairs.items():
        expected = base[name] + pair.alpha / pair.a.shape[1] * (pair.a @ pair.b)
        assert np.abs(exported[name] - expected).max() < 1e-5
        assert exported.grid(name) is None
