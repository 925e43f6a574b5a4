"""The Keras model against transformers' model of the same weights, for each generation."""

from __future__ import annotations

import dataclasses
import sys
import types

import keras
import keras_hub
import numpy as np
import pytest
import torch
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM
from gemma_keras.model.layers import rotate
from tests.models import GENERATIONS, WINDOW, random_ids, relative_difference, write_tiny_hf

pytestmark = pytest.mark.keras

EOS, BOS = 1, 2
LENGTH = 24
each_generation = pytest.mark.parametrize("generation", GENERATIONS)


def spread(value):
    """A case that each generation runs on one backend."""
    return pytest.param(value, marks=pytest.mark.spread)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Generation to (our model, transformers' model), each made once."""
    made = {}

    def get(generation, tied=True):
        if (generation, tied) not in made:
            folder = tmp_path_factory.mktemp(generation)
            reference = write_tiny_hf(folder, generation, tied=tied)
            made[generation, tied] = GemmaCausalLM.from_preset(folder, dtype="float32"), reference
        return made[generation, tied]

    return get


def reference_logits(reference, ids):
    with torch.no_grad():
        return reference(torch.tensor(ids, dtype=torch.int64)).logits.float().numpy()


@each_generation
def test_logits_are_those_of_transformers(tiny, generation, record_property):
    model, reference = tiny(generation)
    ids = random_ids()
    difference = relative_difference(model.logits(ids), reference_logits(reference, ids))
    record_property(f"{generation} logits, greatest difference / spread", f"{difference:.1e}")
    assert difference < 1e-4


@each_generation
def test_logits_with_a_head_of_its_own_are_those_of_transformers(tiny, generation):
    model, reference = tiny(generation, tied=False)
    ids = random_ids()
    assert relative_difference(model.logits(ids), reference_logits(reference, ids)) < 1e-4


@each_generation
@pytest.mark.parametrize("real", [slice(0, 15), slice(9, LENGTH)], ids=["right", "left"])
def test_padding_on_either_side_changes_nothing(tiny, generation, real):
    model, _ = tiny(generation)
    ids = random_ids()
    mask = np.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1
    padded = ops.convert_to_numpy(model({"token_ids": ids, "padding_mask": mask}))
    alone = model.logits(ids[1:2, real])
    assert relative_difference(padded[1:2, real], alone) < 1e-4


@each_generation
@pytest.mark.parametrize("prefill", [spread(1), spread(WINDOW - 1), WINDOW, spread(WINDOW + 1)])
def test_call_in_chunks_over_a_cache_equals_the_whole_call(tiny, generation, prefill):
    backbone = tiny(generation)[0].backbone
    ids = random_ids()
    cache = backbone.empty_cache(len(ids), LENGTH + 2)
    start, outputs = 0, []
    for length in [prefill, *[1] * (LENGTH - 3 - prefill), 3]:
        hidden, cache = backbone.call_with_cache(ids[:, start : start + length], cache, start)
        outputs.append(ops.convert_to_numpy(hidden))
        start += length
    whole = ops.convert_to_numpy(backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    assert relative_difference(np.concatenate(outputs, axis=1), whole) < 1e-4


@each_generation
def test_rows_of_a_batch_may_stand_at_different_positions(tiny, generation):
    """As with prompts of different length: each row writes and looks where its own text ends."""
    backbone = tiny(generation)[0].backbone
    ids = random_ids()
    lengths = np.arange(len(ids), dtype="int32") * 3 + WINDOW
    cache = backbone.empty_cache(len(ids), LENGTH)
    _, cache = backbone.call_with_cache(ids[:, : lengths.max()], cache, 0)  # longer than some rows
    found = []
    for step in range(3):
        tokens = ids[np.arange(len(ids)), lengths + step][:, None]
        hidden, cache = backbone.call_with_cache(tokens, cache, lengths + step)
        found.append(ops.convert_to_numpy(hidden))
    whole = ops.convert_to_numpy(backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    expected = np.stack([whole[i, n : n + 3] for i, n in enumerate(lengths)])
    assert relative_difference(np.concatenate(found, axis=1), expected) < 1e-4


def test_rotation_is_of_pairs_by_the_position_times_the_frequency():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype("float32")
    positions = np.array([[0, 1, 2, 3], [5, 6, 7, 8]], "int32")
    found = ops.convert_to_numpy(rotate(x, positions, 100.0, 2.0))
    angle = positions[:, None, :, None] * 100.0 ** (-np.arange(3) / 3) / 2
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# --- generate ------------------------------------------------------------------------------------


def pad(rows, length):
    token_ids = np.zeros((len(rows), length), "int32")
    padding_mask = np.zeros((len(rows), length), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = 1
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def without_preprocessor(model, **compile_arguments):
    bare = GemmaCausalLM(model.backbone)
    bare.compile(**compile_arguments)
    return bare


def reference_greedy(reference, row, length, **arguments):
    ids = torch.tensor(row[None], dtype=torch.int64)
    ids = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_length=length,
        do_sample=False,
        **({"eos_token_id": None} | arguments),
    )
    return ids[0].numpy()


@each_generation
def test_greedy_generation_of_unequal_prompts_is_that_of_transformers(tiny, generation):
    model, reference = tiny(generation)
    rows = [random_ids(1, length, seed=length)[0] for length in (3, WINDOW, 16)]
    inputs = pad(rows, LENGTH + 8)
    found = without_preprocessor(model).generate(inputs, stop_token_ids=None)["token_ids"]
    expected = [reference_greedy(reference, row, LENGTH + 8) for row in rows]
    np.testing.assert_array_equal(found, expected)


def test_generation_ends_a_row_at_its_stop_token(tiny):
    model, reference = tiny("gemma3")
    row = random_ids(1, 5)[0]
    free = reference_greedy(reference, row, LENGTH)
    stop = int(free[9])
    end = int(np.flatnonzero(free[5:] == stop)[0]) + 5
    bare = without_preprocessor(model)
    found = bare.generate(pad([row], LENGTH), stop_token_ids=[stop])
    np.testing.assert_array_equal(found["token_ids"][0, : end + 1], free[: end + 1])
    np.testing.assert_array_equal(found["padding_mask"][0], np.arange(LENGTH) <= end)


def test_top_k_sampling_depends_on_its_seed_alone(tiny):
    model, _ = tiny("gemma")
    prompt = random_ids(1, 5)[0]

    def sample(seed):
        sampler = keras_hub.samplers.TopKSampler(k=5, seed=seed)
        bare = without_preprocessor(model, sampler=sampler)
        return bare.generate(pad([prompt], 16), stop_token_ids=None)["token_ids"]

    first, again, other = sample(1), sample(1), sample(2)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_generate_takes_and_gives_text(tiny):
    model, reference = tiny("gemma3")
    model.compile(sampler="greedy")
    tokenizer = model.preprocessor.tokenizer
    prompt = "the bread"
    row = np.array([BOS, *tokenizer(prompt)], "int32")
    text = model.generate(prompt, max_length=LENGTH)
    expected = reference_greedy(reference, row, LENGTH, eos_token_id=EOS)
    assert text == tokenizer.detokenize(expected[1:])


# --- saving, dtypes ------------------------------------------------------------------------------


@each_generation
def test_save_to_preset_round_trip_gives_the_same_bits(tiny, generation, tmp_path):
    model, _ = tiny(generation, tied=generation != "gemma2")
    model.save_to_preset(str(tmp_path))
    loaded = GemmaCausalLM.from_preset(str(tmp_path), dtype="float32")
    ids = random_ids()
    np.testing.assert_array_equal(loaded.logits(ids), model.logits(ids))
    assert loaded.backbone.config == model.backbone.config
    text = "Seven small stones"
    np.testing.assert_array_equal(
        loaded.preprocessor.tokenizer(text), model.preprocessor.tokenizer(text)
    )


@each_generation
def test_weight_source_gives_back_the_weights_that_were_loaded(tiny, generation):
    model, _ = tiny(generation, tied=False)
    copy = GemmaBackbone(model.backbone.config, dtype="float32", kernel_initializer="zeros")
    copy.load_weight_source(model.backbone.weight_source())
    ids = {"token_ids": random_ids(), "padding_mask": np.ones((3, LENGTH), "int32")}
    np.testing.assert_array_equal(
        ops.convert_to_numpy(copy(ids)), ops.convert_to_numpy(model.backbone(ids))
    )


@each_generation
def test_bfloat16_errs_no_more_than_transformers_in_bfloat16(generation, tmp_path, record_property):
    reference = write_tiny_hf(tmp_path, generation)
    model = GemmaCausalLM.from_preset(tmp_path, dtype="bfloat16")
    ids = random_ids()
    exact = reference_logits(reference, ids)
    theirs = reference_logits(reference.to(torch.bfloat16), ids)
    ours = model.logits(ids)

    def error(found, expected):
        return np.sqrt(np.mean(np.square(found - expected))) / exact.std()

    figures = error(ours, exact), error(theirs, exact), error(ours, theirs)
    record_property(
        f"{generation} bfloat16 logits, rms difference / spread",
        "{:.4f} from float32, transformers {:.4f}, from each other {:.4f}".format(*figures),
    )
    assert figures[0] < 1.5 * figures[1]
    assert figures[2] < 0.1


def test_embedding_scale_is_rounded_to_the_dtype_of_the_model(tiny):
    config = dataclasses.replace(tiny("gemma3")[0].backbone.config, embedding_scale=640**0.5)
    # In bfloat16 25.298 is 25.25, and 1.125 times that is nearest to 28.375, not to 28.5.
    for dtype, product in (
        ("bfloat16", 28.375),
        ("float32", np.float32(1.125) * np.float32(640**0.5)),
    ):
        backbone = GemmaBackbone(config, dtype=dtype)
        backbone.token_embedding.embeddings.assign(np.full((config.vocabulary_size, 96), 1.125))
        embed = keras.Function(backbone.input, backbone.transformer_layers[0].input[0])
        ones = np.ones((1, 1), "int32")
        embedded = embed({"token_ids": ones, "padding_mask": ones})
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(embedded, "float32")), product)


def test_exporting_names_the_module_that_hides_the_projects_own(tiny, tmp_path, monkeypatch):
    """A notebook with an export.py beside it, which says nothing about missing packages."""
    other = types.ModuleType("export")
    other.__file__ = str(tmp_path / "export.py")
    monkeypatch.setitem(sys.modules, "export", other)
    with pytest.raises(ImportError, match=rf"hidden by {tmp_path}/export\.py; rename that file"):
        tiny("gemma3")[0].export(tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_answered_with_the_projects_own_too(tiny, tmp_path):
    with pytest.raises(ValueError, match="'tflite'; Gemma Keras exports 'onnx', 'safetensors'"):
        tiny("gemma3")[0].export(tmp_path / "out", format="tflite")
