"""Bidirectional attention and the vectors of texts, against transformers and plain torch."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import sentencepiece
import torch
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaTextEmbedder
from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.errors import CheckpointError, ConfigError
from gemma_keras.open import open_checkpoint
from tests.gemma_keras.embedder_files import (
    DIM,
    MAX_TOKENS,
    PROMPTS,
    WINDOW,
    by_torch,
    write_tiny_embedder,
)
from tests.models import TEXT, tiny_tokenizer_model

pytestmark = pytest.mark.keras
once = pytest.mark.backends("torch")  # what a text becomes and what is refused, no backend changes

LENGTH = 30  # more than twice the window
TEXTS = TEXT.split("\n")  # of unequal length
TOO_LONG = "".join(TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embedder")


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' model and the projections that are in the folder."""
    return write_tiny_embedder(folder)


@pytest.fixture(scope="module")
def model(folder, reference):
    return GemmaTextEmbedder.from_preset(folder, dtype="float32")


def relative_difference(found, expected):
    """Greatest difference in units of the expected values' standard deviation."""
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / expected.std()


# --- hidden states -------------------------------------------------------------------------------


def batch():
    """Three rows: whole, padded on the right, padded on the left."""
    ids = np.random.default_rng(1).integers(4, 300, (3, LENGTH)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 19:] = 0
    mask[2, :8] = 0
    return ids, mask


def hidden_states(backbone, ids, mask):
    """The embeddings, and what each block gives, the last normed: as transformers lists them."""
    x = backbone.embed(ids)
    states = [x]
    for block in backbone.transformer_layers:
        x = block(x, padding_mask=mask)
        states.append(x)
    states[-1] = backbone.layer_norm(x)
    return [ops.convert_to_numpy(state) for state in states]


def test_every_hidden_state_is_that_of_transformers(model, reference, record_property):
    ids, mask = batch()
    with torch.no_grad():
        expected = reference[0](
            torch.tensor(ids, dtype=torch.int64),
            attention_mask=torch.tensor(mask, dtype=torch.int64),
            output_hidden_states=True,
        ).hidden_states
    found = hidden_states(model.backbone, ids, mask)
    assert len(found) == len(expected) == 5
    real = mask.astype(bool)
    differences = [
        relative_difference(ours[real], theirs.numpy()[real])
        for ours, theirs in zip(found, expected, strict=True)
    ]
    record_property("bidirectional, greatest difference / spread", f"{max(differences):.1e}")
    assert max(differences) < 1e-4


def test_the_window_reaches_half_of_what_the_file_says_each_way(model):
    """One block of a window: which tokens' hidden states change with the token in the middle."""
    block = model.backbone.transformer_layers[0]
    assert block.spec.sliding_window == WINDOW // 2 + 1
    ids, _ = batch()
    x = ops.convert_to_numpy(model.backbone.embed(ids[:1]))
    changed = x.copy()
    changed[0, LENGTH // 2] += 1
    before, after = (ops.convert_to_numpy(block(array)) for array in (x, changed))
    seen = np.flatnonzero(np.abs(after - before).max(axis=(0, 2)))
    reach = WINDOW // 2
    assert seen.tolist() == list(range(LENGTH // 2 - reach, LENGTH // 2 + reach + 1))


@pytest.mark.parametrize(("keras_hub_window", "same"), [(WINDOW + 1, True), (WINDOW, False)])
def test_keras_hub_sees_one_token_fewer_back_in_an_even_window(keras_hub_window, same):
    """So that its EmbeddingGemma, of a window of 512, differs from transformers' on long texts."""
    from gemma_keras.keras_hub.convert import write_keras_hub

    sizes = {"vocab_size": 300, "hidden_size": 48, "head_dim": 16, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 2}
    causal = config_from_hf(
        {
            "model_type": "gemma3_text",
            "sliding_window": WINDOW,
            **sizes,
            "query_pre_attn_scalar": 16,
        }
    )
    both_ways = [
        dataclasses.replace(
            s, bidirectional=True, sliding_window=s.sliding_window and WINDOW // 2 + 1
        )
        for s in causal.layers
    ]
    keras.utils.set_random_seed(0)
    source = GemmaCausalLM(GemmaBackbone(causal, dtype="float32"))
    ours = GemmaBackbone(dataclasses.replace(causal, layers=tuple(both_ways)), dtype="float32")
    ours.load_weight_source(source.backbone.weight_source())
    theirs = write_keras_hub(source.as_checkpoint(), "float32").backbone
    for block in theirs.transformer_layers:
        block.use_bidirectional_attention = True
        block.attention.use_bidirectional_attention = True
        block.attention.sliding_window_size = keras_hub_window
    ids, _ = batch()
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    found, expected = (ops.convert_to_numpy(backbone(inputs)) for backbone in (ours, theirs))
    assert (relative_difference(found, expected) < 1e-4) == same


# --- encode --------------------------------------------------------------------------------------


def test_vectors_are_those_of_plain_torch(model, reference, record_property):
    found = model.encode(TEXTS, batch_size=3)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), DIM)
    difference = relative_difference(found, by_torch(reference, TEXTS))
    record_property("encode, greatest difference / spread", f"{difference:.1e}")
    assert difference < 1e-4
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_what_a_text_is_batched_with_does_not_change_its_vector(model):
    alone = np.concatenate([model.encode(text) for text in TEXTS])
    for batch_size in (3, 32):
        together = model.encode(TEXTS, batch_size=batch_size)
        assert relative_difference(together, alone) < 1e-5


@once
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_put_before_the_text(model, reference, name):
    found = model.encode(TEXTS[:2], prompt_name=name)
    expected = by_torch(reference, TEXTS[:2], prompt=PROMPTS[name])
    assert relative_difference(found, expected) < 1e-4
    given = model.encode(TEXTS[:2], prompt=PROMPTS[name])
    np.testing.assert_array_equal(given, found)


@once
def test_a_default_prompt_is_used_unless_another_is_asked_for(model, monkeypatch):
    plain, query = model.encode(TEXTS[:2]), model.encode(TEXTS[:2], prompt_name="query")
    monkeypatch.setattr(model, "default_prompt_name", "query")
    np.testing.assert_array_equal(model.encode(TEXTS[:2]), query)
    np.testing.assert_array_equal(model.encode(TEXTS[:2], prompt=""), plain)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_is_cut_before_it_is_normalized(model, reference, normalize):
    found = model.encode(TEXTS[:3], truncate_dim=16, normalize=normalize)
    expected = by_torch(reference, TEXTS[:3], normalize=normalize, dim=16)
    assert relative_difference(found, expected) < 1e-4


def test_the_model_itself_gives_the_vectors_of_a_padded_batch(model):
    packed = model.preprocessor(TEXTS[:3])
    assert packed["token_ids"].shape == (3, MAX_TOKENS)
    found = ops.convert_to_numpy(model(packed))
    assert relative_difference(found, model.encode(TEXTS[:3])) < 1e-4


@once
def test_white_space_around_a_text_is_left_out_and_control_tokens_are_text(model, reference):
    np.testing.assert_array_equal(model.encode(f" \n{TEXTS[0]}\t "), model.encode(TEXTS[0]))
    assert relative_difference(model.encode("<eos>"), by_torch(reference, ["<eos>"])) < 1e-4


@once
def test_a_text_that_is_too_long_is_cut_with_a_warning(model):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer_model())
    ids = pieces.encode(TOO_LONG)
    assert len(ids) > MAX_TOKENS
    with pytest.warns(UserWarning, match="1 of 2 texts have over 120 tokens"):
        found = model.encode([TEXTS[0], TOO_LONG], normalize=False)
    token_ids = np.array([[2, *ids[: MAX_TOKENS - 2], 1]], "int32")
    hidden = model.backbone({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    x = ops.convert_to_numpy(hidden)[0].mean(axis=0)
    for layer in model.projections:
        x = x @ ops.convert_to_numpy(layer.kernel)
    assert relative_difference(found[1], x) < 1e-4


@once
def test_no_texts_and_empty_ones(model, reference):
    assert model.encode([]).shape == (0, DIM)
    assert relative_difference(model.encode([""]), by_torch(reference, [""])) < 1e-4


@once
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt_name": "title"}, "'title'; this model has: document, query"),
        ({"prompt_name": "query", "prompt": "a"}, "not both"),
        ({"truncate_dim": 0}, "truncate_dim is 0; it must be 1 to 40"),
        ({"truncate_dim": DIM + 1}, "truncate_dim is 41; it must be 1 to 40"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
    ],
    ids=str,
)
def test_what_encode_cannot_do_is_said(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.encode(TEXTS[:1], **arguments)


@once
def test_without_a_preprocessor_there_are_no_texts(model):
    bare = GemmaTextEmbedder(model.backbone, projection_dims=())
    with pytest.raises(ValueError, match="preprocessor"):
        bare.encode(TEXTS[:1])
    assert bare.dim == model.backbone.config.hidden_dim


def test_a_preset_gives_the_same_vectors(model, tmp_path):
    model.save_to_preset(str(tmp_path))
    again = GemmaTextEmbedder.from_preset(tmp_path, dtype="float32")
    assert again.prompts == PROMPTS
    found = again.encode(TEXTS[:3], prompt_name="query")
    np.testing.assert_allclose(found, model.encode(TEXTS[:3], prompt_name="query"), atol=1e-6)


@once
def test_what_a_folder_is_loaded_with_counts(model, folder, tmp_path):
    model.save_to_preset(str(tmp_path))
    for source in (tmp_path, folder):
        other = GemmaTextEmbedder.from_preset(
            source, load_weights=False, dtype="mixed_bfloat16", sequence_length=9
        )
        assert other.preprocessor.sequence_length == 9
        assert other.preprocessor(TEXTS[:1])["token_ids"].shape == (1, 9)
        assert other.dtype_policy.name == "mixed_bfloat16"
        name = "layers.0.mlp.up"
        difference = other.backbone.weight_source()[name] - model.backbone.weight_source()[name]
        assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_vectors_in_float16_are_near(model, folder, dtype):
    found = GemmaTextEmbedder.from_preset(folder, dtype=dtype).encode(TEXTS[:3])
    np.testing.assert_allclose(found, model.encode(TEXTS[:3]), atol=5e-3)


@pytest.mark.usefixtures("reference")  # writes the folder
@pytest.mark.filterwarnings("ignore:4 of 4 texts have over")
def test_training_goes_on_after_load_model(folder, tmp_path):
    model = GemmaTextEmbedder.from_preset(folder, dtype="float32", sequence_length=LENGTH)
    model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), loss="cosine_similarity")
    targets = np.random.default_rng(0).normal(size=(4, DIM)).astype("float32")
    one = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(np.array(TEXTS[:4]), targets, **one)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    for each in (model, loaded):
        each.fit(np.array(TEXTS[:4]), targets, **one)
    np.testing.assert_allclose(loaded.encode(TEXTS[:4]), model.encode(TEXTS[:4]), atol=1e-6)


def test_after_lora_is_trained_encode_follows(folder, reference):
    model = GemmaTextEmbedder.from_preset(folder, dtype="float32")
    texts = TEXTS[:4]
    before = model.encode(texts)
    model.backbone.enable_lora(2)
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="cosine_similarity")
    targets = np.random.default_rng(0).normal(size=(len(texts), DIM)).astype("float32")
    model.fit(np.array(texts), targets, batch_size=4, epochs=2, shuffle=False, verbose=0)
    after = model.encode(texts)
    assert np.abs(after - before).max() > 1e-3
    found = ops.convert_to_numpy(model(model.preprocessor(texts)))
    assert relative_difference(found, after) < 1e-4


# --- what it is not ------------------------------------------------------------------------------


@once
def test_it_generates_nothing(model, folder):
    words = "bidirectional attention .*GemmaTextEmbedder"
    with pytest.raises(ConfigError, match=f"GemmaCausalLM needs .*{words}"):
        GemmaCausalLM(model.backbone)
    with pytest.raises(ConfigError, match=f"GemmaCausalLM needs .*{words}"):
        GemmaCausalLM.from_preset(folder)
    ids, _ = batch()
    with pytest.raises(ConfigError, match=f"generation needs .*{words}"):
        model.backbone.prefill(ids, np.full(len(ids), LENGTH, "int32"), LENGTH)
    with pytest.raises(ConfigError, match=f"generation needs .*{words}"):
        model.backbone.call_with_cache(ids, model.backbone.empty_cache(len(ids), LENGTH), 0)


@once
def test_other_formats_have_no_place_for_it(reference, folder, tmp_path):
    from gemma_keras.checkpoints.gguf.writer import write_gguf
    from gemma_keras.keras_hub.convert import write_keras_hub

    checkpoint = open_checkpoint(folder)
    with pytest.raises(ConfigError, match=r"GGUF .*bidirectional attention"):
        write_gguf(checkpoint, tmp_path / "m.gguf", "f32")
    with pytest.raises(ConfigError, match=r"KerasHub .*bidirectional attention"):
        write_keras_hub(checkpoint)
    assert not list(tmp_path.iterdir())


@once
def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    write_tiny_embedder(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.model"):
        GemmaTextEmbedder.from_preset(tmp_path)
