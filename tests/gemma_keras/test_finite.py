"""float16, whose range Gemma's activations exceed, and numbers that are not finite."""

from __future__ import annotations

import functools
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM
from gemma_keras.errors import NotFiniteError
from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer
from tests.models import TEXT, chat_tokenizer_model, shallow, write_tiny_hf

pytestmark = pytest.mark.keras

LINES = TEXT.splitlines()[:4]
FLOAT16_MOST = 65_504


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A generation to a small model's preset. Its activations are beyond float16, as real ones are."""

    @functools.cache
    def make(generation):
        folder = tmp_path_factory.mktemp(generation)
        write_tiny_hf(folder, generation, **shallow(generation))
        model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=40)
        for name in ("layers.0", "layers.1"):
            # where nothing is normed behind it the product itself is too large
            last = "mlp.down" if generation == "gemma" else "post_ffw_norm"
            variable = model.backbone.variable(f"{name}.{last}")
            variable.assign(ops.convert_to_numpy(variable) * 30_000 + (last != "mlp.down") * 30_000)
        model.save_to_preset(str(folder / "preset"))
        return folder / "preset"

    return make


def ids():
    return np.random.default_rng(1).integers(4, 300, (3, 24)).astype("int32")


def hidden_and_logits(model, mask):
    inputs = {"token_ids": ids(), "padding_mask": mask}
    after = model.backbone.embed(ids())
    for block in model.backbone.transformer_layers:
        after = block(after, padding_mask=mask)
    return ops.convert_to_numpy(ops.cast(after, "float32")), ops.convert_to_numpy(
        ops.cast(model(inputs), "float32")
    )


@pytest.mark.spread
@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_float16_is_right_where_activations_exceed_it(folders, generation):
    mask = np.ones((3, 24), "int32")
    mask[1, :9], mask[2, 15:] = 0, 0
    exact = GemmaCausalLM.from_preset(folders(generation), dtype="float32")
    hidden, expected = hidden_and_logits(exact, mask)
    assert np.abs(hidden).max() > 2 * FLOAT16_MOST
    real = mask.astype(bool)
    for dtype in ("float16", "mixed_float16"):
        model = GemmaCausalLM.from_preset(folders(generation), dtype=dtype)
        assert model.dtype_policy.compute_dtype == "float16"
        found, logits = hidden_and_logits(model, mask)
        assert found.dtype == np.float32 and np.isfinite(logits).all()
        differences = found[real] - hidden[real], logits[real] - expected[real]
        for difference, of in zip(differences, (hidden, expected), strict=True):
            assert np.sqrt(np.mean(difference**2)) < 0.02 * of[real].std()
        text = model.generate("The boat", max_length=30)
        assert len(text) > len("The boat")
        assert "".join(model.stream("The boat", max_length=30)).strip() in text


def test_what_is_no_float16_policy_is_left_as_it_was(folders):
    """The residual stream of bfloat16 is bfloat16."""
    for dtype in ("bfloat16", "mixed_bfloat16"):
        model = GemmaCausalLM.from_preset(folders("gemma3"), dtype=dtype)
        x = model.backbone.embed(ids())
        for layer in (model.backbone.transformer_layers[0], model.backbone.layer_norm):
            x = layer(x)
            assert keras.backend.standardize_dtype(x.dtype) == "bfloat16"
            assert layer.autocast


# --- not finite ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(folders):
    """A model whose last norm is infinite, with the turn template's tokens."""
    model = GemmaCausalLM.from_preset(folders("gemma3"), dtype="float32")
    tokenizer = GemmaTokenizer(proto=chat_tokenizer_model())
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=40)
    scale = ops.convert_to_numpy(model.backbone.layer_norm.scale).copy()
    scale[5] = np.nan
    model.backbone.layer_norm.scale.assign(scale)
    return GemmaCausalLM(model.backbone, preprocessor, instruction_tuned=True)


WAYS_TO_SPEAK = {
    "generate": lambda model: model.generate("The boat", max_length=20),
    "batch": lambda model: model.generate(["The boat", "A"], max_length=20),
    "stream": lambda model: list(model.stream("The boat", max_length=20)),
    "chat": lambda model: model.chat("The boat?", max_length=30),
}


@pytest.mark.parametrize(
    "sampler", ["greedy", pytest.param("top_p", marks=pytest.mark.spread("way"))]
)
@pytest.mark.parametrize("way", WAYS_TO_SPEAK)
def test_a_model_that_computes_no_numbers_says_so(broken, way, sampler):
    broken.compile(sampler=sampler)
    with pytest.raises(NotFiniteError, match=r"not finite.*final_norm/scale.*Load the model again"):
        WAYS_TO_SPEAK[way](broken)


def test_a_beam_of_no_numbers_says_so(broken):
    broken.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    with pytest.raises(NotFiniteError, match="final_norm/scale"):
        broken.generate("The boat", max_length=16)


def test_a_row_that_is_infinite_later_is_named(tmp_path):
    """One token's embedding is infinite: the row is fine until that token is chosen."""
    write_tiny_hf(tmp_path, "gemma3", tied=False, **shallow("gemma3"))
    model = GemmaCausalLM.from_preset(tmp_path, dtype="float32")
    bare = GemmaCausalLM(model.backbone)
    bare.compile(sampler="greedy")
    prompt = {"token_ids": ids()[:, :16], "padding_mask": np.arange(16) < [[5], [4], [6]]}
    chosen = bare.generate(prompt, stop_token_ids=None)["token_ids"]
    later = next(t for t in chosen[1, 6:] if t not in chosen[0] and t not in chosen[2])
    table = ops.convert_to_numpy(model.backbone.token_embedding.embeddings).copy()
    table[later, 0] = np.inf
    model.backbone.token_embedding.embeddings.assign(table)
    with pytest.raises(NotFiniteError, match=r"row 1 of 3.*token_embedding/embeddings holds"):
        bare.generate(prompt, stop_token_ids=None)


def test_what_must_not_be_chosen_may_be_minus_infinity(folders, monkeypatch):
    model = GemmaCausalLM.from_preset(folders("gemma3"), dtype="float32")
    generation = model.make_generate_function()
    logits = np.random.default_rng(0).normal(size=(2, 300)).astype("float32")
    logits[:, 100:] = -np.inf
    found = ops.convert_to_numpy(generation._sample(ops.convert_to_tensor(logits)))
    np.testing.assert_array_equal(found, logits.argmax(-1))
    for value in (np.inf, np.nan):
        logits[1, 7] = value
        found = ops.convert_to_numpy(generation._sample(ops.convert_to_tensor(logits)))
        np.testing.assert_array_equal(found, [logits[0].argmax(), -1])


# --- training ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_told_once(broken):
    broken.compile(optimizer="sgd")
    # JAX does not wait for callbacks: that of the second batch may be first
    with pytest.warns(UserWarning, match=r"the loss is nan from batch [01] on") as told:
        broken.fit(LINES, batch_size=1, epochs=2, shuffle=False, verbose=0)
    assert sum("the loss is" in str(one.message) for one in told) == 1
    with pytest.warns(UserWarning, match="the loss is nan"):
        history = broken.fit(
            LINES, epochs=3, shuffle=False, verbose=0, callbacks=keras.callbacks.TerminateOnNaN()
        )
    assert len(history.epoch) == 1


def test_training_float16_weights_is_told(folders):
    model = GemmaCausalLM.from_preset(folders("gemma"), dtype="float16")
    with pytest.warns(UserWarning, match="load the model with dtype='mixed_float16'"):
        model.fit(LINES[:1], shuffle=False, verbose=0)


def test_training_in_mixed_float16_lowers_the_loss(folders):
    model = GemmaCausalLM.from_preset(
        folders("gemma3"), dtype="mixed_float16", gradient_checkpointing=True
    )
    model.compile(optimizer=keras.optimizers.SGD(1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = model.fit(LINES, epochs=6, shuffle=False, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
