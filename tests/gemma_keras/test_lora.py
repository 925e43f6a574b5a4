"""LoRA adapters: what they add, several by name, and their way to PEFT and llama.cpp and back."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import warnings
from pathlib import Path

import gguf
import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM, named_config, open_checkpoint
from gemma_keras.checkpoints.adapters.read import read_adapter
from gemma_keras.checkpoints.adapters.write import Base, write_gguf_adapter, write_peft_adapter
from gemma_keras.checkpoints.low_rank import Adapter, Pair
from gemma_keras.errors import CheckpointError
from gemma_keras.model import lora
from gemma_keras.sizes import SIZES
from tests.gemma_keras.llama_cpp import llama, needs_llama_cpp
from tests.gemma_keras.writers import for_gguf
from tests.models import GENERATIONS, TEXT, random_ids, shallow, tiny_hf, write_tiny_hf

pytestmark = pytest.mark.keras

LINES = TEXT.splitlines()
IDS = random_ids(2, 20)
LENGTH = 80
ALL_LINEAR = 7  # matrices of a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_hf(folder, "gemma3", **shallow("gemma3"))
    return folder


def load(folder, **options):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=LENGTH, **options)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    return model


def fill(model, seed=0, size=0.2):
    """Give the adapter in the layers values that matter."""
    random = np.random.default_rng(seed)
    for layer in lora.layers_of(model.backbone).values():
        if layer.has_lora:
            for matrix in (layer.lora_kernel_a, layer.lora_kernel_b):
                matrix.assign(size * random.normal(size=matrix.shape))
    return model


def adapted(folder, **options):
    model = load(folder)
    model.enable_lora(**{"rank": 3, "alpha": 5, "targets": "all-linear"} | options)
    return fill(model)


@contextlib.contextmanager
def quiet():
    """PEFT warns of tied tables, and of names of transformers that it still uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def near(found, expected, tolerance=1e-4):
    assert np.abs(found - expected).max() < tolerance * expected.std()


def by_hand(model):
    """Logits of the model whose weights are W + alpha / rank * A @ B, computed here."""
    weights = dict(model.backbone.weight_source())
    with model.without_adapter():
        weights = {name: np.array(array) for name, array in model.backbone.weight_source().items()}
    for name, layer in lora.layers_of(model.backbone).items():
        if layer.has_lora:
            a, b = (ops.convert_to_numpy(m) for m in (layer.lora_kernel_a, layer.lora_kernel_b))
            weights[name] = weights[name] + layer.lora_alpha / layer.lora_rank * (a @ b)
    plain = GemmaCausalLM(type(model.backbone)(model.backbone.config, dtype="float32"))
    plain.backbone.load_weight_source(weights)
    return plain.logits(IDS)


def assert_merged_alike(path, base, model):
    """An adapter that is merged while its base is read gives the model's own merged weights."""
    merged, weights = open_checkpoint(path, base=base), model.backbone.weight_source()
    for name in weights:
        assert np.abs(merged.weights[name] - weights[name]).max() < 1e-5


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
    with quiet():  # the embedding stays in float
        model.quantize(mode)
    return model


@pytest.mark.parametrize("mode", ["int8", "int4"])
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


# --- PEFT ----------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"rslora": True},
    {"targets": None, "alpha": None},
    {"targets": ["layers.1.attention.query", "layers.0.mlp.up", "layers.1.mlp.up"]},
]


def with_peft(generation, folder, path):
    import peft
    import torch

    base = tiny_hf(generation, **shallow(generation))
    with quiet():
        model = peft.PeftModel.from_pretrained(base, path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy(), model


@pytest.mark.backends("torch")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_loads_what_is_saved(folder, settings, tmp_path):
    model = adapted(folder, **settings)
    expected = model.logits(IDS)
    model.save_adapter(tmp_path / "adapter")
    found, wrapped = with_peft("gemma3", folder, tmp_path / "adapter")
    near(found, expected)
    assert wrapped.peft_config["default"].use_rslora == settings.get("rslora", False)
    other = load(folder)
    other.load_adapter(tmp_path / "adapter")
    np.testing.assert_array_equal(other.logits(IDS), expected)
    other.save_adapter(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = ((tmp_path / n / name).read_bytes() for n in ("adapter", "again"))
        assert first == second
    assert_merged_alike(tmp_path / "adapter", folder, model)


@pytest.mark.backends("torch")
def test_each_matrix_may_have_a_rank_and_alpha_of_its_own(folder, tmp_path):
    import peft
    import torch

    base = tiny_hf("gemma3", **shallow("gemma3"))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 5, "up_proj": 2},
        alpha_pattern={"layers.0.self_attn.o_proj": 9},
        lora_dropout=0.25,
        init_lora_weights=False,
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    with quiet():
        wrapped = peft.get_peft_model(base, config).eval()
        wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor(IDS).long()).logits.numpy()
    model = load(folder)
    model.load_adapter(tmp_path / "theirs")
    near(model.logits(IDS), expected)
    assert lora.values_of(model.backbone).dropout == 0.25
    model.save_adapter(tmp_path / "ours")
    near(with_peft("gemma3", folder, tmp_path / "ours")[0], expected)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["use_rslora"] and written["lora_dropout"] == 0.25
    assert len(written["rank_pattern"]) == 3 and len(written["alpha_pattern"]) == 1


@pytest.mark.backends("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_goes_to_peft_and_back(generation, dtype, tmp_path):
    write_tiny_hf(tmp_path / "base", generation, **shallow(generation))
    model = adapted(tmp_path / "base")
    model.save_adapter(tmp_path / "adapter", dtype=dtype)
    expected = model.logits(IDS)
    found, _ = with_peft(generation, tmp_path / "base", tmp_path / "adapter")
    near(found, expected, tolerance=0.2)
    other = load(tmp_path / "base")
    other.load_adapter(tmp_path / "adapter")
    near(found, other.logits(IDS))


@pytest.mark.backends("torch")
def test_each_adapter_is_saved_by_its_name(folder, tmp_path):
    model = adapted(folder, name="one")
    one = model.logits(IDS)
    model.enable_lora(rank=2, name="two")
    fill(model, seed=1)
    two = model.logits(IDS)
    for name in (None, "one", "two"):
        model.save_adapter(tmp_path / str(name), name)
    other = load(folder)
    for name, expected in (("one", one), ("two", two), ("None", two)):
        other.load_adapter(tmp_path / name, name)
        np.testing.assert_array_equal(other.logits(IDS), expected)
    with pytest.raises(ValueError, match="no adapter 'three'; there are: one, two, None"):
        other.save_adapter(tmp_path / "three", "three")
    with pytest.raises(ValueError, match="an adapter 'one' already"):
        other.load_adapter(tmp_path / "one", "one")


# Each name that the guide promises, and the matrix of a block that it is.
NAMES = {
    "attention.query": ("query", "q_proj"),
    "attention.key": ("key", "k_proj"),
    "attention.value": ("value", "v_proj"),
    "attention.output": ("output", "attention_output", "o_proj"),
    "mlp.gate": ("gate", "gate_proj"),
    "mlp.up": ("up", "up_proj"),
    "mlp.down": ("down", "down_proj"),
}


@pytest.mark.backends("torch")
@pytest.mark.parametrize("size", SIZES)
def test_every_target_of_every_size_goes_to_both_files_and_back(size, tmp_path):
    """At full depth and width, with matrices of rank 1, of which no two are alike."""
    config = named_config(size)
    specs = lora.matrices(config)
    for matrix, names in NAMES.items():
        expected = [f"layers.{i}.{matrix}" for i in range(len(config.layers))]
        for name in names:
            assert lora.chosen(config, name) == expected
        assert lora.chosen(config, [expected[-1]]) == expected[-1:]
        module = specs[expected[0]].hf.removesuffix(".weight")
        assert lora.chosen(config, [module]) == expected[:1]
    assert lora.chosen(config, "all-linear") == list(specs)
    random = np.random.default_rng(0)
    pairs = {
        name: Pair(
            random.normal(size=(spec.shape[0], 1)).astype("float32"),
            random.normal(size=(1, spec.shape[1])).astype("float32"),
            2.0,
        )
        for name, spec in specs.items()
    }
    base = Base({"repository": "a/b"}, {})
    write_peft_adapter(tmp_path / "peft", Adapter(pairs), config, base)
    paths = [tmp_path / "peft"]
    if SIZES[size].causal:
        write_gguf_adapter(tmp_path / "adapter.gguf", Adapter(pairs), config)
        paths.append(tmp_path / "adapter.gguf")
    for path in paths:
        found = read_adapter(path, config).adapter()
        assert found.pairs.keys() == pairs.keys()
        for name, pair in found.pairs.items():
            np.testing.assert_array_equal(pair.a, pairs[name].a)
            np.testing.assert_array_equal(pair.b, pairs[name].b)
            assert pair.alpha == 2


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    adapted(folder).save_adapter(path)
    return path


def changed(saved, tmp_path, **settings):
    path = shutil.copytree(saved, tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    return path


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"bias": "all"}, "biases"),
        ({"r": 4}, "gives the rank 4"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_expressed_is_refused_by_name(
    saved, folder, settings, said, tmp_path
):
    model = load(folder)
    with pytest.raises(CheckpointError, match=said):
        model.load_adapter(changed(saved, tmp_path, **settings))
    assert model.adapters == ()


@pytest.mark.backends("torch")
def test_whole_tables_are_refused(folder, tmp_path):
    import peft

    base = tiny_hf("gemma3", **shallow("gemma3"))
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    with quiet():
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="changes token_embedding, and LoRA here stands"):
        load(folder).load_adapter(tmp_path / "adapter")


@pytest.mark.backends("torch")
def test_an_adapter_for_another_size_or_base_is_refused(saved, tmp_path):
    write_tiny_hf(tmp_path / "wide", "gemma3", **shallow("gemma3"), intermediate_size=96)
    model = load(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"of shape \[96, 160\], but .* \[96, 96\]"):
        model.load_adapter(saved, check_base=False)
    write_tiny_hf(tmp_path / "other", "gemma3", seed=7, **shallow("gemma3"))
    model = load(tmp_path / "other")
    with pytest.raises(CheckpointError, match="was trained on another base model: the norm"):
        model.load_adapter(saved)
    model.load_adapter(saved, check_base=False)
    assert model.active_adapter == "default"


@pytest.mark.backends("torch")
def test_a_base_is_known_in_other_precisions_and_not_when_a_norm_was_tuned(folder, saved):
    for dtype in ("bfloat16", "float16"):
        model = GemmaCausalLM.from_preset(folder, dtype=dtype, sequence_length=LENGTH)
        model.load_adapter(saved)
    model = load(folder)
    scale = model.backbone.transformer_layers[1].pre_ffw_norm.scale
    scale.assign(ops.convert_to_numpy(scale) + 0.002)
    with pytest.raises(CheckpointError, match=r"the norm layers\.1\.pre_ffw_norm has the mean"):
        model.load_adapter(saved)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_an_adapter_cut_short_is_told(folder, form, share, tmp_path):
    path = tmp_path / f"adapter.{form}"
    adapted(folder).save_adapter(path, format=form)
    file = path / "adapter_model.safetensors" if form == "peft" else path
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    model = load(folder)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        model.load_adapter(path)
    assert model.adapters == ()


@pytest.mark.backends("torch")
def test_values_that_are_not_finite_are_refused_both_ways(folder, saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = shutil.copytree(saved, tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = np.nan
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="with values that are not finite"):
        load(folder).load_adapter(path)
    model = adapted(folder)
    layer = model.backbone.transformer_layers[0].mlp.up
    layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, np.inf))
    for options in ({"format": "peft"}, {"format": "gguf"}):
        with pytest.raises(CheckpointError, match="not finite"):
            model.save_adapter(tmp_path / "bad", **options)
        assert not (tmp_path / "bad").exists()


@pytest.mark.backends("torch")
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_a_disk_that_becomes_full_leaves_nothing(folder, form, tmp_path, monkeypatch):
    """The space is there when it is asked for, and is gone when the matrices are written."""
    model = adapted(folder)
    path = tmp_path / "adapter"

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match="no space was left while writing"):
        model.save_adapter(path, format=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.backends("torch")
def test_an_adapter_replaces_an_adapter_alone(folder, saved, tmp_path):
    model = adapted(folder)
    path = shutil.copytree(saved, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="already exists"):
        model.save_adapter(path)
    model.save_adapter(path, overwrite=True)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="will not be overwritten"):
        model.save_adapter(path, overwrite=True)
    with pytest.raises(ValueError, match="format is 'onnx'; it must be"):
        model.save_adapter(tmp_path / "x", format="onnx")
    with pytest.raises(CheckpointError, match="dtype is 'int8'; choose one of"):
        model.save_adapter(tmp_path / "x", dtype="int8")
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="is not an adapter: neither a folder"):
            load(folder).load_adapter(missing)


# --- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.backends("torch")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_gguf_adapter_comes_back(generation, rslora, tmp_path):
    base, path = tmp_path / "base", tmp_path / "adapter.gguf"
    write_tiny_hf(base, generation, **shallow(generation))
    model = adapted(base, rslora=rslora)
    model.save_adapter(path, format="gguf")
    other = load(base)
    other.load_adapter(path, name="mine")
    near(other.logits(IDS), model.logits(IDS))
    assert other.adapters == ("mine",)
    assert_merged_alike(path, base, model)
    reader = gguf.GGUFReader(path)  # the package of llama.cpp's authors
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == generation
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    last = lora.layers_of(model.backbone)["layers.1.mlp.down"]
    for half, matrix in (("a", last.lora_kernel_a), ("b", last.lora_kernel_b)):
        found = tensors[f"blk.1.ffn_down.weight.lora_{half}"]
        np.testing.assert_array_equal(found, ops.convert_to_numpy(matrix).T)


@pytest.mark.backends("torch")
def test_scales_of_a_gguf_adapter_are_put_into_one(folder, tmp_path):
    model = adapted(folder, targets=["query", "down"])
    query = model.backbone.transformer_layers[0].attention.query
    query.lora_alpha = 11.0
    model.save_adapter(tmp_path / "adapter.gguf", format="gguf")
    other = load(folder)
    other.load_adapter(tmp_path / "adapter.gguf")
    near(other.logits(IDS), by_hand(model))


PROMPT = [2, 5, 90, 200, 280, 281, 282, 150, 151, 30, 31]
NEW_TOKENS = 24
NEAR = 0.01  # as a share of the logits' spread: llama.cpp's GELU is a table of float16
KINDS = ("alpha / rank", "rsLoRA", "patterns")
KEYS = ("token_ids", "padding_mask")


def of_many_shapes(model, path):
    """Load an adapter in which neighbours differ in rank, and some in alpha."""
    random = np.random.default_rng(0)
    pairs = {}
    for number, (name, spec) in enumerate(lora.matrices(model.backbone.config).items()):
        a, b = (spec.shape[0], 2 + number % 3), (2 + number % 3, spec.shape[1])
        pairs[name] = Pair(
            *(0.2 * random.normal(size=shape).astype("float32") for shape in (a, b)),
            alpha=(5.0, 3.0)[number % 4 == 0],
        )
    write_peft_adapter(path, Adapter(pairs), model.backbone.config, Base({}, {}))
    written = json.loads((path / "adapter_config.json").read_text())
    assert written["rank_pattern"] and written["alpha_pattern"]
    model.load_adapter(path, check_base=False)


def greedy(model, ids):
    """The tokens that a model goes on with, and the logits after the first of `ids`, the second, and
    so on, to the last but one of all."""
    inputs = {key: np.zeros((1, len(ids) + NEW_TOKENS), "int32") for key in KEYS}
    inputs["token_ids"][0, : len(ids)] = ids
    inputs["padding_mask"][0, : len(ids)] = 1
    bare = GemmaCausalLM(model.backbone)
    tokens = bare.generate(inputs, stop_token_ids=None)["token_ids"][0].tolist()
    return tokens[len(ids) :], model.logits([tokens[:-1]])[0]


def assert_llama_cpp_agrees(model, ids, before, folder):
    """Both go on alike with the adapter, as far as no two tokens are about as likely; otherwise than
    without it.

    Args:
        model: with the adapter in use.
        ids: of the prompt.
        before: what `greedy` returned without it.
        folder: that holds `base.gguf`.

    Returns:
        What was measured, as a sentence.
    """
    model.save_adapter(folder / "adapter.gguf", format="gguf")
    expected, logits = greedy(model, ids)
    second, first = np.partition(logits[len(ids) - 1 :], -2)[:, -2:].T
    clear = first - second > 2 * NEAR * logits.std()
    certain = NEW_TOKENS if clear.all() else int(clear.argmin())  # before the first near-tie
    assert clear.sum() > NEW_TOKENS / 3
    plain = llama(folder / "base.gguf", ids, before[0], NEW_TOKENS)
    found = llama(folder / "base.gguf", ids, expected, NEW_TOKENS, lora=folder / "adapter.gguf")
    moved = np.abs(logits[: len(ids)] - before[1][: len(ids)]).max()
    assert found["answer"] != plain["answer"] and moved > 50 * NEAR * logits.std()
    assert found["answer"][:certain] == expected[:certain]
    best = np.array(found["best"][len(ids) - 1 : -1])
    np.testing.assert_array_equal(best[clear], np.array(expected)[clear])
    off, off_of_base = (
        np.abs(np.array(theirs["logits"])[:-1] - ours[:, :300]).max() / ours.std()
        for theirs, ours in ((found, logits), (plain, before[1]))
    )
    assert off < NEAR
    same = sum(a == b for a, b in zip(found["answer"], expected, strict=True))
    return (
        f"{same} of {NEW_TOKENS} greedy tokens are equal; logits within {off:.1e} of their spread, "
        f"without the adapter {off_of_base:.1e}"
    )


@needs_llama_cpp
@pytest.mark.peer
@pytest.mark.backends("torch")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_llama_cpp_runs_a_small_adapter_as_keras_does(generation, kind, tmp_path, record_property):
    write_tiny_hf(tmp_path / "hf", generation)
    checkpoint = for_gguf(open_checkpoint(tmp_path / "hf"))
    model = GemmaCausalLM.from_checkpoint(checkpoint, dtype="float32")
    model.export(tmp_path / "base.gguf", format="gguf", tensor_type="f32")
    before = greedy(model, PROMPT)
    if kind == "patterns":
        of_many_shapes(model, tmp_path / "patterns")
    else:
        model.enable_lora(rank=3, alpha=5, targets="all-linear", rslora=kind == "rsLoRA")
        fill(model)
    said = assert_llama_cpp_agrees(model, PROMPT, before, tmp_path)
    record_property(f"llama.cpp with an adapter of {generation}, {kind}", said)


@needs_llama_cpp
@pytest.mark.sample
@pytest.mark.peer
@pytest.mark.backends("torch")
def test_llama_cpp_runs_an_adapter_of_the_sample(tmp_path, record_property):
    model = GemmaCausalLM.from_preset("sample", dtype="float32")
    model.export(tmp_path / "base.gguf", format="gguf", tensor_type="f32")
    tokenizer = model.preprocessor.tokenizer
    ids = [tokenizer.start_token_id, *map(int, tokenizer("The three primary colors are"))]
    before = greedy(model, ids)
    model.enable_lora(rank=3, alpha=5, targets="all-linear", rslora=True)
    fill(model, size=0.02)
    record_property(
        "llama.cpp with an adapter of the sample",
        assert_llama_cpp_agrees(model, ids, before, tmp_path),
    )
