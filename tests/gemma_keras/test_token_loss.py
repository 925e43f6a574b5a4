"""Cross-entropy in chunks of tokens: value and gradients are those of all logits at once."""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras.quantizers import Int4QuantizationConfig

from gemma_keras.model import token_loss
from gemma_keras.model.embedding import ReversibleEmbedding
from gemma_keras.model.losses import NAMES, TokenLoss, TokenMetric, mean, sums_of_logits
from gemma_keras.model.quantized import quantized_weight
from gemma_keras.model.token_loss import token_sums

pytestmark = pytest.mark.keras

VOCABULARY, WIDTH, ROWS, LENGTH = 300, 16, 3, 21
CHUNK = 8 * 4 * VOCABULARY  # eight tokens; the last chunk is not full
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(ROWS, LENGTH, WIDTH)).astype("float32") * 2
TARGETS = RNG.integers(0, VOCABULARY, (ROWS, LENGTH)).astype("int32")
WEIGHTS = RNG.choice([0, 0, 0.5, 1, 2], (ROWS, LENGTH)).astype("float32")


def embedding_of(tied=True, cap=None, dtype="float32", lora=False):
    keras.utils.set_random_seed(1)
    embedding = ReversibleEmbedding(
        VOCABULARY,
        WIDTH,
        tie_weights=tied,
        logit_soft_cap=cap,
        dtype=dtype,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.3),
    )
    embedding.build()
    if lora:
        embedding.enable_lora(2)
        embedding.lora_embeddings_b.assign(RNG.normal(size=(2, WIDTH)))
    return embedding


def plain(embedding, hidden, weights=WEIGHTS):
    """The sums of all logits at once, as the layer makes them."""
    hidden = ops.cast(hidden, embedding.compute_dtype)
    return sums_of_logits(embedding(hidden, reverse=True), TARGETS, weights)


def chunked(embedding, hidden, weights=WEIGHTS, training=True):
    return token_sums(embedding, hidden, TARGETS, weights, training, chunk_bytes=CHUNK)


def by_layer(embedding, hidden, weights=WEIGHTS):
    """As a quantized table is run, and one that is spread over devices."""
    hidden = ops.cast(hidden, embedding.compute_dtype)
    weights = ops.convert_to_tensor(weights)
    return token_loss._by_layer(embedding, hidden, ops.convert_to_tensor(TARGETS), weights, 8)


def numbers(sums):
    return [float(ops.convert_to_numpy(one)) for one in sums]


def gradients(function, embedding):
    """Of the weighted sum: as for hidden states, then as for each trainable variable; and the sums
    that the same compiled function gives."""
    variables = embedding.trainable_variables
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        def run(hidden, values):
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                sums = function(embedding, hidden)
            return sums[0], sums

        values = [variable.value for variable in variables]
        step = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
        (of_hidden, others), sums = step(ops.convert_to_tensor(HIDDEN), values)
    elif backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def step(hidden):
            with tf.GradientTape() as tape:
                tape.watch(hidden)
                sums = function(embedding, hidden)
            return tape.gradient(sums[0], [hidden, *(v.value for v in variables)]), sums

        (of_hidden, *others), sums = step(tf.constant(HIDDEN))
    else:
        hidden = ops.convert_to_tensor(HIDDEN).requires_grad_()
        sums = function(embedding, hidden)
        sums[0].backward()
        of_hidden, others = hidden.grad, [variable.value.grad for variable in variables]
        for variable in variables:
            variable.value.grad = None
    found = [g for g in (of_hidden, *others) if g is not None]
    return [ops.convert_to_numpy(ops.cast(g, "float32")) for g in found], numbers(sums)


def worst(found, expected):
    """Greatest difference, by the greatest number of each; one that is all zeros is left out."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if np.abs(b).max() > 0]
    assert pairs
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


# --- value and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("way", [chunked, by_layer])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("tied", "lora"), [(True, False), (False, False), (True, True)])
def test_chunks_give_value_and_gradients_of_all_logits(way, cap, tied, lora):
    embedding = embedding_of(tied, cap, lora=lora)
    expected_gradients, expected = gradients(plain, embedding)
    found_gradients, found = gradients(way, embedding)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert worst(found_gradients, expected_gradients) < 1e-5
    np.testing.assert_allclose(numbers(way(embedding, HIDDEN)), expected, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_is_no_further_from_float32_than_all_logits(dtype, cap):
    exact, expected = gradients(plain, embedding_of(cap=cap))
    embedding = embedding_of(cap=cap, dtype=dtype)
    whole, at_once = gradients(plain, embedding)
    parts, found = gradients(chunked, embedding)
    assert abs(found[0] - expected[0]) <= abs(at_once[0] - expected[0]) + 1e-4 * expected[0]
    assert worst(parts, exact) < 1.5 * worst(whole, exact) + 1e-4


def test_a_frozen_table_gets_no_gradient():
    embedding = embedding_of()
    expected, _ = gradients(plain, embedding)
    embedding.trainable = False
    (of_hidden,), _ = gradients(chunked, embedding)
    assert worst([of_hidden], expected[:1]) < 1e-5


def test_evaluation_makes_the_sums_alone():
    embedding = embedding_of()
    expected = numbers(plain(embedding, HIDDEN))
    found = chunked(embedding, ops.convert_to_tensor(HIDDEN), training=False)
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-5)


def test_sums_by_hand():
    """In float64 with numpy."""
    embedding = embedding_of(cap=3.0)
    table = ops.convert_to_numpy(embedding.embeddings).astype("float64")
    logits = 3 * np.tanh(HIDDEN.astype("float64") @ table.T / 3)
    mass = np.log(np.exp(logits).sum(-1))
    losses = mass - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    counts = WEIGHTS != 0
    right = (logits.argmax(-1) == TARGETS) & counts
    expected = [(losses * WEIGHTS).sum(), losses[counts].sum(), right.sum(), counts.sum()]
    np.testing.assert_allclose(numbers(chunked(embedding, HIDDEN)), expected, rtol=1e-6)


@pytest.mark.parametrize("way", [plain, chunked, by_layer])
def test_what_does_not_count_may_be_anything(way):
    embedding = embedding_of()
    expected, sums = gradients(way, embedding)
    spoilt = np.where(WEIGHTS[..., None] != 0, HIDDEN, 1e4).astype("float32")
    found = numbers(way(embedding, ops.convert_to_tensor(spoilt)))
    np.testing.assert_allclose(found, sums, rtol=1e-6)
    assert not expected[0][WEIGHTS == 0].any()


@pytest.mark.parametrize("way", [plain, chunked, by_layer])
def test_a_batch_in_which_nothing_counts_teaches_nothing(way):
    embedding = embedding_of()

    def nothing(embedding, hidden):
        return way(embedding, hidden, weights=np.zeros_like(WEIGHTS))

    found, sums = gradients(nothing, embedding)
    assert sums == [0, 0, 0, 0] and not any(gradient.any() for gradient in found)
    assert float(ops.convert_to_numpy(mean(nothing(embedding, HIDDEN)))) == 0


# --- a table in integers -------------------------------------------------------------------------

QUANTIZED = {
    "int8": {"mode": "int8"},
    "int4 by row, rounded inputs": {"mode": "int4"},
    "int4 by row": {"mode": "int4", "config": Int4QuantizationConfig(block_size=None)},
    "int4 in blocks": {"mode": "int4", "config": Int4QuantizationConfig(block_size=8)},
}


each_quantized = pytest.mark.parametrize("mode", QUANTIZED)
pytestmark = [
    pytestmark,
    # Keras transposes a vector of scales.
    pytest.mark.filterwarnings("ignore:[\\s\\S]*The use of `x.T` on tensors:UserWarning"),
]


def slope_by_hand(embedding, cap):
    """The gradient of hidden states, in float64; it passes through the rounding of inputs."""
    table = quantized_weight(embedding, not embedding.tie_weights).values().astype("float64")
    x = HIDDEN.astype("float64")
    if embedding.inputs_quantizer:
        steps = 127 / np.abs(x).max(-1, keepdims=True)
        x = np.round(x * steps) / steps
    logits = x @ table.T
    capped = logits if cap is None else cap * np.tanh(logits / cap)
    shares = np.exp(capped)
    slopes = shares / shares.sum(-1, keepdims=True) - np.eye(VOCABULARY)[TARGETS]
    slopes *= 1 if cap is None else 1 - (capped / cap) ** 2
    return WEIGHTS[..., None] * slopes @ table


# parts of 38, 4 and 300 rows; the last one of 38 overlaps
@pytest.mark.parametrize(("cap", "tokens"), [(None, 8), (3.0, 1), (3.0, 300)])
@each_quantized
def test_a_quantized_table_is_read_in_parts(mode, cap, tokens):
    """The sums are those of Keras's head."""
    embedding = embedding_of(cap=cap)
    embedding.quantize(**QUANTIZED[mode], type_check=False)

    def parts(embedding, hidden):
        return token_sums(embedding, hidden, TARGETS, WEIGHTS, chunk_bytes=tokens * 4 * VOCABULARY)

    (found,), sums = gradients(parts, embedding)
    np.testing.assert_allclose(sums, numbers(plain(embedding, HIDDEN)), rtol=1e-5)
    alone = token_sums(embedding, ops.convert_to_tensor(HIDDEN), TARGETS, WEIGHTS, False)
    np.testing.assert_allclose(numbers(alone), sums, rtol=1e-5)
    assert worst([found], [slope_by_hand(embedding, cap)]) < 1e-5


@pytest.mark.parametrize(("cap", "tied"), [(3.0, True), (None, False)])
@each_quantized
def test_logits_of_a_quantized_head_have_gradients(mode, cap, tied):
    """As distillation and preferences make them, and the loss of an untied head."""
    embedding = embedding_of(tied, cap)
    embedding.quantize(**QUANTIZED[mode], type_check=False)
    (found,), _ = gradients(by_layer, embedding)
    assert worst([found], [slope_by_hand(embedding, cap)]) < 1e-5


def test_an_untied_or_adapted_table_is_left_to_its_layer():
    for tied, lora in ((False, False), (True, True)):
        embedding = embedding_of(tied)
        embedding.quantize("int8", type_check=False)
        if lora:
            embedding.enable_lora(2)
            embedding.lora_embeddings_b.assign(RNG.normal(size=(2, WIDTH)))
        _, expected = gradients(plain, embedding)
        _, found = gradients(chunked, embedding)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- what is kept of a batch ---------------------------------------------------------------------


@pytest.mark.backends("jax")  # the others do not say what a step will take
def test_no_logits_are_kept_whole(record_property):
    import jax

    embedding = keras_hub.layers.ReversibleEmbedding(32_768, 64)
    embedding.build()
    length = 2048
    arguments = (
        jax.ShapeDtypeStruct((1, length, 64), "float32"),
        jax.ShapeDtypeStruct((1, length), "int32"),
        jax.ShapeDtypeStruct((1, length), "float32"),
    )

    def bytes_of(function):
        def run(table, hidden, targets, weights):
            with keras.StatelessScope(state_mapping=[(embedding.trainable_variables[0], table)]):
                return function(hidden, targets, weights)[0]

        table = jax.ShapeDtypeStruct((32_768, 64), "float32")
        step = jax.jit(jax.grad(run, argnums=(0, 1)))
        return step.lower(table, *arguments).compile().memory_analysis().temp_size_in_bytes

    whole = bytes_of(lambda h, t, w: sums_of_logits(embedding(h, reverse=True), t, w))
    parts = bytes_of(lambda *a: token_sums(embedding, *a, chunk_bytes=64 * 4 * 32_768))
    record_property("bytes of a step", f"{parts:,} in chunks, {whole:,} at once")
    logits = 4 * length * 32_768
    assert whole > logits and parts < logits / 4


# --- loss and metrics ----------------------------------------------------------------------------


def test_the_loss_of_logits_is_per_token_that_counts():
    embedding = embedding_of()
    logits = embedding(ops.convert_to_tensor(HIDDEN), reverse=True)
    sums = numbers(plain(embedding, HIDDEN))
    found = TokenLoss()(TARGETS, logits, WEIGHTS)
    assert float(ops.convert_to_numpy(found)) == pytest.approx(sums[0] / sums[3], rel=1e-6)
    alone = TokenLoss()(TARGETS, logits)
    ones = numbers(plain(embedding, HIDDEN, np.ones_like(WEIGHTS)))
    assert float(ops.convert_to_numpy(alone)) == pytest.approx(ones[1] / TARGETS.size, rel=1e-6)


def test_metrics_are_of_all_tokens_whatever_the_batches():
    embedding = embedding_of()
    whole = numbers(plain(embedding, HIDDEN))
    metrics = {name: TokenMetric(name) for name in ("loss", *NAMES)}
    for rows in (slice(0, 1), slice(1, 3)):
        logits = embedding(ops.convert_to_tensor(HIDDEN[rows]), reverse=True)
        sums = sums_of_logits(logits, TARGETS[rows], WEIGHTS[rows])
        for metric in metrics.values():
            metric.add(sums)
            metric.update_state(1e6, sample_weight=3)  # as a trainer would
    found = {name: float(ops.convert_to_numpy(one.result())) for name, one in metrics.items()}
    assert found["loss"] == pytest.approx(whole[1] / whole[3], rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-6)
    assert found["sparse_categorical_accuracy"] == pytest.approx(whole[2] / whole[3])
    metrics["loss"].reset_state()
    assert float(ops.convert_to_numpy(metrics["loss"].result())) == 0
