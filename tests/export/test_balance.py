"""Balanced weights are the same model, and the sizes they are balanced by are the true ones."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from export.calibrate.balance import BalancedWeights
from export.calibrate.observe import observe
from export.calibrate.reference import embedded, reference_logits
from gemma_keras import GemmaBackbone, GemmaCausalLM, open_checkpoint
from tests.models import GENERATIONS, write_tiny_hf

pytestmark = pytest.mark.keras

LENGTH = 40
each_generation = pytest.mark.parametrize("generation", GENERATIONS)
# Matrix by canonical name: transformers' name for it, and where its inputs come from.
OBSERVED = {
    "attention.query": "self_attn.q_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Generation to checkpoint, Keras model and transformers' model, each made once."""
    made = {}

    def get(generation):
        if generation not in made:
            folder = tmp_path_factory.mktemp(generation)
            reference = write_tiny_hf(folder, generation)
            checkpoint = open_checkpoint(folder)
            made[generation] = SimpleNamespace(
                config=checkpoint.config,
                weights={name: np.array(array) for name, array in checkpoint.weights.items()},
                logits=logits_of(checkpoint.config, checkpoint.weights),
                reference=reference,
            )
        return made[generation]

    return get


def random_ids(seed=1):
    return np.random.default_rng(seed).integers(4, 300, LENGTH).astype("int32")


def moments_of(config, weights, ids):
    """Matrix name to the statistics of its inputs, on one row of tokens."""
    x = embedded(config, weights, ids[None])
    blocks = enumerate(observe(config, weights, x))
    return {f"layers.{i}.{name}": m for i, found in blocks for name, m in found.items()}


def channel_rms(config, weights, ids):
    return {name: statistics.rms for name, statistics in moments_of(config, weights, ids).items()}


def logits_of(config, weights):
    backbone = GemmaBackbone(config, dtype="float32", kernel_initializer="zeros")
    backbone.load_weight_source(weights)
    return GemmaCausalLM(backbone).logits(random_ids()[None])


def widths(config):
    """Every observed matrix's name and number of inputs."""
    for i, layer in enumerate(config.layers):
        yield f"layers.{i}.attention.query", config.hidden_dim
        yield f"layers.{i}.attention.output", layer.num_heads * layer.head_dim
        yield f"layers.{i}.mlp.gate", config.hidden_dim
        yield f"layers.{i}.mlp.down", layer.ffw_dim


def random_sizes(config, spread, dead=0.0, seed=0):
    """Made-up channel sizes over `spread` powers of ten, a share of them dead."""
    rng = np.random.default_rng(seed)
    sizes = {name: 10 ** rng.uniform(-spread / 2, spread / 2, n) for name, n in widths(config)}
    return {
        n: np.where(rng.random(s.shape) < dead, 0, s).astype("float32") for n, s in sizes.items()
    }


def assert_same_logits(found, expected):
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


# --- BalancedWeights -----------------------------------------------------------------------------


@pytest.mark.spread
@each_generation
def test_weights_balanced_by_measured_sizes_are_the_same_model(tiny, generation):
    model = tiny(generation)
    sizes = channel_rms(model.config, model.weights, random_ids(2))
    balanced = BalancedWeights(model.config, model.weights, sizes)
    assert_same_logits(logits_of(model.config, balanced), model.logits)


@pytest.mark.spread
@each_generation
def test_weights_balanced_by_wild_sizes_are_the_same_model(tiny, generation):
    """Sizes without rhyme show a factor that is missing, or divided where it should multiply."""
    model = tiny(generation)
    balanced = BalancedWeights(model.config, model.weights, random_sizes(model.config, 4))
    assert_same_logits(logits_of(model.config, balanced), model.logits)


@pytest.mark.spread
@each_generation
def test_balancing_moves_every_weight_it_should_and_no_other(tiny, generation):
    model = tiny(generation)
    balanced = BalancedWeights(model.config, model.weights, random_sizes(model.config, 4))
    assert list(balanced) == list(model.weights)
    assert len(balanced) == len(model.weights)
    same = {n for n, array in model.weights.items() if np.array_equal(balanced[n], array)}
    kept = ("token_embedding", "final_norm")
    norms = ("query_norm", "key_norm", "post_attention_norm", "post_ffw_norm")
    assert same == {n for n in model.weights if n in kept or n.endswith(norms)}
    for name, array in model.weights.items():
        assert balanced[name].dtype == np.float32
        assert balanced[name].shape == array.shape


def test_balancing_evens_out_the_channels(tiny):
    """Halfway, as powers go: a range of 100 between channels becomes one of 10."""
    model = tiny("gemma3")
    weights = dict(model.weights)
    uneven = np.where(np.arange(model.config.hidden_dim) % 2, 100, 1).astype("float32")
    weights["layers.2.pre_ffw_norm"] = uneven - 1
    ids = random_ids()

    def gate_inputs(weights):
        sizes = channel_rms(model.config, weights, ids)
        rms = sizes["layers.2.mlp.gate"]
        return sizes, np.median(rms[1::2]) / np.median(rms[::2])

    sizes, before = gate_inputs(weights)
    _, after = gate_inputs(BalancedWeights(model.config, weights, sizes))
    assert after == pytest.approx(before**0.5, rel=0.15)


@pytest.mark.spread
@each_generation
@pytest.mark.parametrize("dead", [0.1, 0.7, 1.0])
def test_dead_channels_leave_the_weights_finite_and_the_model_the_same(tiny, generation, dead):
    model = tiny(generation)
    sizes = random_sizes(model.config, 3, dead=dead)
    balanced = BalancedWeights(model.config, model.weights, sizes)
    assert all(np.isfinite(balanced[name]).all() for name in balanced)
    assert_same_logits(logits_of(model.config, balanced), model.logits)


def test_channels_that_are_dead_in_the_model_are_measured_as_such(tiny):
    model = tiny("gemma2")
    weights = {name: array.copy() for name, array in model.weights.items()}
    weights["layers.1.mlp.up"][:, 5] = 0
    weights["layers.1.pre_attention_norm"][7] = -1  # a factor of 0
    weights["layers.1.attention.value"][:, 3] = 0
    sizes = channel_rms(model.config, weights, random_ids())
    assert sizes["layers.1.mlp.down"][5] == 0
    assert sizes["layers.1.attention.query"][7] == 0
    assert sizes["layers.1.attention.output"][[3, 35]].tolist() == [0, 0]  # both heads of kv head 0
    balanced = BalancedWeights(model.config, weights, sizes)
    assert all(np.isfinite(balanced[name]).all() for name in balanced)
    assert_same_logits(logits_of(model.config, balanced), logits_of(model.config, weights))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays("float32", 96, elements=st.floats(0, 2.0**100, width=32)))
@example(np.where(np.arange(96) == 5, 2.0**100, 2.0**-149).astype("float32"))
@example(np.full(96, 2.0**-149, "float32"))
def test_factors_are_finite_and_bounded_whatever_the_sizes(tiny, sizes):
    model = tiny("gemma")
    made_up = random_sizes(model.config, 0) | {"layers.0.mlp.gate": sizes}
    balanced = BalancedWeights(model.config, model.weights, made_up)
    factors = balanced["layers.0.mlp.gate"] / model.weights["layers.0.mlp.gate"]
    assert np.isfinite(factors).all()
    # a square root of 1000 either way of the typical channel
    assert factors.min() > 0.9 / 1000
    assert factors.max() < 1.1 * 1000


# --- what is observed ----------------------------------------------------------------------------


def reference_moments(model):
    """The same figures from transformers' model, by hooks on its linear layers."""
    found, handles = {}, []

    def watch(name, linear):
        def hook(module, inputs):
            flat = inputs[0].double().reshape(-1, inputs[0].shape[-1])
            found[name] = (flat.T @ flat / len(flat)).numpy()

        handles.append(linear.register_forward_pre_hook(hook))

    for i in range(len(model.config.layers)):
        for name, theirs in OBSERVED.items():
            layer = model.reference.get_submodule(f"model.layers.{i}.{theirs}")
            watch(f"layers.{i}.{name}", layer)
    with torch.no_grad():
        model.reference(torch.tensor(random_ids()[None], dtype=torch.int64))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.spread
@each_generation
def test_moments_are_of_what_flows_through_transformers_model(tiny, generation):
    model = tiny(generation)
    found = moments_of(model.config, model.weights, random_ids())
    expected = reference_moments(model)
    assert found.keys() == expected.keys() == dict(widths(model.config)).keys()
    for name, statistics in expected.items():
        (square,) = found[name].squares
        scale = np.diag(statistics).max()
        np.testing.assert_allclose(square, statistics, rtol=1e-4, atol=1e-5 * scale, err_msg=name)
        rms = np.sqrt(np.diag(statistics))
        np.testing.assert_allclose(found[name].rms, rms, rtol=1e-4, atol=1e-5 * rms.max())
        assert square.dtype == np.float32


@pytest.mark.spread
@each_generation
def test_the_reference_is_the_keras_model(tiny, generation):
    model, told = tiny(generation), []
    rows = np.stack([random_ids(), random_ids(2)])
    positions = np.array([0, 7, LENGTH - 1])
    found = reference_logits(
        model.config, model.weights, rows, positions, lambda *args: told.append(args)
    )
    assert_same_logits(found[:3], model.logits[0, positions])
    assert found.shape == (6, model.config.vocabulary_size)
    blocks = len(model.config.layers)
    assert told == [(i + 1, blocks) for i in range(blocks)]
