"""Layers and models after Keras's `quantize`: their weights are what they multiply by."""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras.quantizers import AWQConfig, GPTQConfig, Int4QuantizationConfig

from export.formats.formats import Format
from export.formats.keep_source import best_format, keep, keep_or_round, kept_weights
from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig, LayerSpec
from gemma_keras.model import embedding as embedding_module
from gemma_keras.model.dense import GemmaDense
from gemma_keras.model.embedding import ReversibleEmbedding
from gemma_keras.model.quantized import quantized_weight

TWO_PLANES = Format(8, 32, symmetric=False, planes=2)

pytestmark = [
    pytest.mark.keras,
    # Keras says so of every layer that it does not quantize.
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    # Keras transposes a vector of scales.
    pytest.mark.filterwarnings("ignore:[\\s\\S]*The use of `x.T` on tensors:UserWarning"),
]

MODES = {
    "int8": {"mode": "int8", "config": None},
    "int4": {"mode": "int4", "config": Int4QuantizationConfig(block_size=None)},
    "int4 in blocks": {"mode": "int4", "config": Int4QuantizationConfig(block_size=32)},
}
each_mode = pytest.mark.parametrize("mode", MODES)
TEXT = ["The gardener waters the young trees before the sun is high."]


class Letters:
    """A tokenizer, as far as Keras's calibration needs one."""

    def tokenize(self, text):
        return np.array([ord(letter) % 50 for letter in text], "int32")


CALIBRATION = {"dataset": TEXT, "tokenizer": Letters(), "num_samples": 1, "sequence_length": 8}


def multiplied_by(layer, num_inputs, **arguments) -> np.ndarray:
    """A layer's weight, as its forward pass shows it: what it makes of the identity."""
    identity = ops.convert_to_tensor(np.eye(num_inputs, dtype="float32"))
    return ops.convert_to_numpy(layer(identity, **arguments))


def close(found, expected):
    # Keras divides by int8 scales, and rounds activations to 8 bits, which is exact for 0 and 1.
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def is_kept(grid, values) -> None:
    """The values are to the bit those of the grid, and of the format it is kept in."""
    np.testing.assert_array_equal(grid.values(), values)
    fmt = best_format(grid)
    assert fmt.bits == grid.bits
    assert fmt.block_size == (32 if grid.block_size >= values.shape[1] else grid.block_size)
    np.testing.assert_array_equal(keep(grid, fmt).values(fmt, values.shape[1]), values)


# --- layers --------------------------------------------------------------------------------------


def dense(num_inputs=40, num_outputs=13) -> keras.layers.Dense:
    layer = keras.layers.Dense(num_outputs, use_bias=False)
    layer.build((None, num_inputs))
    return layer


@each_mode
def test_a_matrix_is_what_the_layer_multiplies_by(mode):
    layer = dense()
    before = ops.convert_to_numpy(layer.kernel).T.copy()
    assert quantized_weight(layer) is None
    layer.quantize(**MODES[mode])
    weight = quantized_weight(layer)
    assert weight.mode == layer.quantization_mode
    close(weight.values(), multiplied_by(layer, 40).T)
    steps = np.abs(before).max() / (127 if mode == "int8" else 7)
    assert np.abs(weight.values() - before).max() < 1.2 * steps
    is_kept(weight.grid(), weight.values())


@each_mode
@pytest.mark.parametrize(("tied", "width"), [(True, 64), (False, 33)])
def test_a_table_is_what_both_directions_multiply_by(mode, tied, width):
    layer = keras_hub.layers.ReversibleEmbedding(20, width, tie_weights=tied)
    layer.build()
    layer.quantize(**MODES[mode], type_check=False)
    table, head = quantized_weight(layer), quantized_weight(layer, reverse=not tied)
    close(table.values(), ops.convert_to_numpy(layer(np.arange(20, dtype="int32"))))
    close(head.values(), multiplied_by(layer, width, reverse=True).T)
    assert (table.values() == head.values()).all() == tied
    for weight in (table, head):
        is_kept(weight.grid(), weight.values())
        if mode != "int8":  # which may reach 127 on both sides
            assert keep_or_round(weight.grid(), TWO_PLANES)[1] == 0


@pytest.mark.parametrize("mode", ["int8", "int4 in blocks"])
def test_lora_is_merged_into_a_matrix_and_lies_on_no_grid(mode):
    layer = dense()
    layer.quantize(**MODES[mode])
    before = quantized_weight(layer).values()
    layer.enable_lora(2, lora_alpha=3)
    layer.lora_kernel_b.assign(np.random.default_rng(0).normal(size=(2, 13)))
    weight = quantized_weight(layer)
    assert np.abs(weight.values() - before).max() > 0.1
    close(weight.values(), multiplied_by(layer, 40).T)
    assert weight.grid() is None


def test_lora_is_merged_into_a_table():
    layer = keras_hub.layers.ReversibleEmbedding(20, 33)
    layer.build()
    layer.quantize("int8", type_check=False)
    layer.enable_lora(2)
    layer.lora_embeddings_b.assign(np.random.default_rng(0).normal(size=(2, 33)))
    weight = quantized_weight(layer)
    close(weight.values(), ops.convert_to_numpy(layer(np.arange(20, dtype="int32"))))
    assert weight.grid() is None


@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (8, -1), (2, 32), (3, 64)])
def test_what_gptq_stores_is_kept_unless_it_groups_by_activation(bits, group_size):
    """Stored by hand: Keras's own loop over inputs takes seconds, and it measures no activations
    (see docs/lab-notes.md), so it never groups by them."""
    layer = dense()
    layer.quantize(
        "gptq", config=GPTQConfig(**CALIBRATION, weight_bits=bits, group_size=group_size)
    )
    assert quantized_weight(layer) is None  # not calibrated: still floats
    rng = np.random.default_rng(bits)
    for name in ("quantized_kernel", "kernel_zero"):
        variable = getattr(layer, name)
        most = 256 if bits == 4 and name == "quantized_kernel" else 1 << bits
        variable.assign(rng.integers(0, most, variable.shape).astype("uint8"))
    layer.kernel_scale.assign(rng.normal(size=layer.kernel_scale.shape))
    groups = np.arange(40, dtype="float32") / (40 if group_size == -1 else group_size)
    layer.g_idx.assign(groups)
    layer.is_gptq_calibrated = True
    weight = quantized_weight(layer)
    close(weight.values(), multiplied_by(layer, 40).T)
    grid = weight.grid()
    assert grid.bits == bits
    np.testing.assert_array_equal(grid.values(), weight.values())
    fmt = best_format(grid)
    assert fmt.bits == (4 if bits == 3 else bits)
    np.testing.assert_array_equal(keep(grid, fmt).values(fmt, 40), weight.values())
    if len(np.unique(groups.astype(int))) > 1:
        layer.g_idx.assign(rng.permutation(groups))
        weight = quantized_weight(layer)
        close(weight.values(), multiplied_by(layer, 40).T)
        assert weight.grid() is None


def test_what_awq_stores_is_kept_unless_inputs_have_factors():
    layer = dense()
    layer.quantize("awq", config=AWQConfig(**CALIBRATION, group_size=16))
    assert quantized_weight(layer) is None
    rng = np.random.default_rng(0)
    for name, most in (("quantized_kernel", 256), ("kernel_zero", 16)):
        variable = getattr(layer, name)
        variable.assign(rng.integers(0, most, variable.shape).astype("uint8"))
    layer.kernel_scale.assign(rng.normal(size=layer.kernel_scale.shape))
    layer.g_idx.assign(np.arange(40) // 16)
    layer.is_awq_calibrated = True
    weight = quantized_weight(layer)
    close(weight.values(), multiplied_by(layer, 40).T)
    is_kept(weight.grid(), weight.values())
    layer.awq_scales.assign(rng.uniform(0.5, 2, 40))
    weight = quantized_weight(layer)
    close(weight.values(), multiplied_by(layer, 40).T)
    assert weight.grid() is None


# --- what QLoRA runs -----------------------------------------------------------------------------


@each_mode
def test_a_table_is_quantized_in_chunks_to_the_same_integers(mode, monkeypatch):
    monkeypatch.setattr(embedding_module, "_CHUNK_BYTES", 4 * 48 * 30)
    keras.utils.set_random_seed(0)
    expected = keras_hub.layers.ReversibleEmbedding(50, 48)
    found = ReversibleEmbedding(50, 48)
    for layer in (expected, found):
        layer.build()
    found.embeddings.assign(expected.embeddings)
    for layer in (expected, found):
        layer.quantize(**MODES[mode], type_check=False)
    assert found.dtype_policy.name == expected.dtype_policy.name
    assert len(found.variables) == len(expected.variables)
    for a, b in zip(found.variables, expected.variables, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    ids = np.array([[0, 49, 7], [7, 3, 3]], "int32")
    close(ops.convert_to_numpy(found(ids)), ops.convert_to_numpy(expected(ids)))


@each_mode
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_training_multiplies_as_keras_does(mode, lora, dtype):
    """And gives the gradient that it gives, without float kernels that wait for it."""
    keras.utils.set_random_seed(0)
    # of Keras's layer in float32: on TensorFlow it has no gradient in mixed precision with LoRA
    layers = GemmaDense(13, use_bias=False, dtype=dtype), keras.layers.Dense(13, use_bias=False)
    for layer in layers:
        layer.build((None, 40))
    layers[0].kernel.assign(layers[1].kernel)
    b = np.random.default_rng(1).normal(size=(2, 13))
    for layer in layers:
        layer.quantize(**MODES[mode])
        if lora:
            layer.enable_lora(2, lora_alpha=3)
            layer.lora_kernel_b.assign(b)
    if lora:
        layers[0].lora_kernel_a.assign(layers[1].lora_kernel_a)
    x = np.random.default_rng(0).normal(size=(5, 40)).astype("float32")
    (found, slope), (expected, of_keras) = (
        value_and_slope(lambda x, layer=layer: layer(x, training=True), x) for layer in layers
    )
    limit = 1e-5 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(found, expected, atol=limit * np.abs(expected).max())
    np.testing.assert_allclose(slope, of_keras, atol=limit * np.abs(of_keras).max())


def value_and_slope(function, x):
    """Of the sum of squares of what a layer makes of inputs: the outputs, and its gradient."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        slope = jax.jit(jax.grad(lambda x: ops.sum(ops.cast(function(x), "float32") ** 2)))(x)
    elif backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = ops.sum(ops.cast(function(x), "float32") ** 2)
        slope = tape.gradient(total, x)
    else:
        x = ops.convert_to_tensor(x).requires_grad_()
        ops.sum(ops.cast(function(x), "float32") ** 2).backward()
        slope = x.grad
    outputs = ops.cast(function(ops.convert_to_tensor(x)), "float32")
    return ops.convert_to_numpy(outputs), ops.convert_to_numpy(slope)


# --- a model -------------------------------------------------------------------------------------

MATRICES = {
    "attention.query": (48, 24),
    "attention.key": (48, 12),
    "attention.value": (48, 12),
    "attention.output": (24, 48),
    "mlp.gate": (48, 40),
    "mlp.up": (48, 40),
    "mlp.down": (40, 48),
}


@pytest.fixture(scope="module")
def model():
    """A model of which each part is quantized in another way, and its weights before."""
    keras.utils.set_random_seed(0)
    layer = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=6, ffw_dim=40, query_scale=0.3)
    config = GemmaConfig(
        vocabulary_size=50,
        hidden_dim=48,
        layers=(layer,),
        embedding_scale=8.0,
        tied_head=False,
    )
    one = GemmaCausalLM(GemmaBackbone(config, dtype="float32"))
    before = {name: np.array(array) for name, array in one.backbone.weight_source().items()}
    one.quantize(**MODES["int8"], filters="query")
    one.quantize(**MODES["int4"], filters=["key", "attention_output"])
    one.quantize(**MODES["int4 in blocks"], filters=["gate", "up"])
    # KerasHub's embedding is a subclass of Keras's, which Keras quantizes only if asked so.
    one.quantize(**MODES["int8"], filters="token_embedding", type_check=False)
    return one, before


def test_each_weight_is_read_from_its_own_layer(model):
    one, before = model
    weights = one.backbone.weight_source()
    stored = {}
    for name, shape in MATRICES.items():
        layer, array = (
            one.backbone.transformer_layers[0].sublayer(name),
            weights[f"layers.0.{name}"],
        )
        assert array.shape == shape
        if (weight := quantized_weight(layer)) is not None:
            np.testing.assert_array_equal(array, weight.values().T)
        stored[name] = weights.stored_as(f"layers.0.{name}")
        if stored[name]:
            is_kept(weights.grid(f"layers.0.{name}"), array.T)
    assert list(stored.values()) == [
        "Keras int8",
        "Keras int4",
        None,
        *["Keras int4"] * 3,
        None,
    ]
    embedding = one.backbone.token_embedding
    for name, reverse in (("token_embedding", False), ("head", True)):
        np.testing.assert_array_equal(weights[name], quantized_weight(embedding, reverse).values())
    for name in ("token_embedding", "head"):
        is_kept(weights.grid(name), weights[name])
    for name in ("final_norm", "layers.0.pre_ffw_norm", "layers.0.mlp.down"):
        np.testing.assert_array_equal(weights[name], before[name])
        assert weights.grid(name) is None


def test_people_are_told_how_keras_has_quantized(model):
    one, _ = model
    kept = kept_weights(one.backbone.config, one.backbone.weight_source())
    assert kept.sentence == (
        "4 Keras int4 matrices of the source are stored unchanged; "
        "1 Keras int8 matrix of the source is rounded again"
    )


def test_a_quantized_model_computes_what_its_weights_say(model):
    one, _ = model
    copy = GemmaBackbone(one.backbone.config, dtype="float32", kernel_initializer="zeros")
    copy.load_weight_source(one.backbone.weight_source())
    ids = np.random.default_rng(0).integers(0, 50, (2, 9)).astype("int32")
    expected = GemmaCausalLM(copy).logits(ids)
    # What is left are the activations that Keras rounds, of the query and the head.
    np.testing.assert_allclose(one.logits(ids), expected, atol=0.1 * expected.std())


def test_a_saved_quantized_model_has_the_same_weights(model, tmp_path):
    one, _ = model
    one.save_to_preset(str(tmp_path))
    loaded = GemmaCausalLM.from_preset(str(tmp_path)).backbone.weight_source()
    for name, array in one.backbone.weight_source().items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded.stored_as(name) == one.backbone.weight_source().stored_as(name)


def test_calibration_starts_from_what_the_first_block_takes(model):
    one, _ = model
    structure = one.get_quantization_layer_structure("gptq")
    ids = np.arange(6, dtype="int32")[None]
    (embed,) = structure["pre_block_layers"]
    rows = one.backbone.weight_source()["token_embedding"][:6]
    np.testing.assert_allclose(ops.convert_to_numpy(embed(ids))[0], 8 * rows, rtol=1e-5)
    assert structure["sequential_blocks"] == one.backbone.transformer_layers
    assert one.get_quantization_layer_structure("int8") is None


@pytest.mark.backends("torch")  # Keras's own loops over inputs are slow elsewhere
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("attention.value", AWQConfig(**CALIBRATION, group_size=16, num_grid_points=2)),
        ("mlp.down", GPTQConfig(**CALIBRATION, weight_bits=4, group_size=16)),
    ],
    ids=["awq", "gptq"],
)
def test_a_model_calibrated_by_keras_is_kept(name, config, model):
    one, before = model
    layer = one.backbone.transformer_layers[0].sublayer(name)
    one.quantize(config=config, filters=f"^{layer.name}$")
    weights, name = one.backbone.weight_source(), f"layers.0.{name}"
    array = weights[name]
    assert weights.stored_as(name) == f"Keras {config.mode}"
    close(array, multiplied_by(layer, len(array)))
    assert np.abs(array - before[name]).max() < np.abs(before[name]).max() / 7
    is_kept(weights.grid(name), array.T)
