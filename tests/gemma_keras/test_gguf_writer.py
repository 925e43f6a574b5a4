"""GGUF files written and read again, by us, by the gguf package and by llama.cpp."""

from __future__ import annotations

import dataclasses
import functools

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2 as proto

from gemma_keras import open_checkpoint
from gemma_keras.checkpoints import source as source_module
from gemma_keras.checkpoints.gguf.config import config_from_gguf, config_to_gguf
from gemma_keras.checkpoints.gguf.writer import write_gguf
from gemma_keras.checkpoints.hf.config import named_config
from gemma_keras.checkpoints.hf.writer import write_safetensors_folder
from gemma_keras.checkpoints.opening.sample import sample_path
from gemma_keras.checkpoints.sentencepiece_model import (
    build_sentencepiece_model,
    tokenizer_metadata,
)
from gemma_keras.checkpoints.source import row_chunks, table_chunks
from gemma_keras.errors import CheckpointError, ConfigError
from gemma_keras.sizes import SIZES
from tests.gemma_keras.llama_cpp import llama, needs_llama_cpp
from tests.gemma_keras.writers import IDS, TYPES, WRITERS, for_gguf, load, logits
from tests.models import GENERATIONS, TEXT, tiny_tokenizer_model


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_gguf_of_float32_comes_back(sources, tmp_path, generation, dtype):
    """Bit for bit, but for what `1 + scale` rounds off a scale of more than bfloat16's digits."""
    checkpoint = for_gguf(open_checkpoint(sources(generation, dtype)))
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32")
    again = open_checkpoint(tmp_path / "m.gguf")
    assert again.config == checkpoint.config
    assert again.provenance["tensor_types"] == {"F32": len(checkpoint.weights)}
    rounded = 0
    for name, array in checkpoint.weights.items():
        if array.ndim == 1 and dtype == "float32":
            array = np.float32(1) + array - np.float32(1)
            rounded += 1
        np.testing.assert_array_equal(again.weights[name], array, err_msg=name)
    assert rounded == 0 or dtype == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("key", ["repository", "base_model"])
def test_where_it_came_from_comes_back(sources, tmp_path, key):
    checkpoint = for_gguf(open_checkpoint(sources("gemma3", "float32")))
    named = checkpoint.provenance | {key: "google/gemma-3-1b-it"}
    write_gguf(dataclasses.replace(checkpoint, provenance=named), tmp_path / "m.gguf", "f32")
    assert open_checkpoint(tmp_path / "m.gguf").provenance["base_model"] == "google/gemma-3-1b-it"


@pytest.mark.parametrize(
    ("kind", "tensor_type"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("f32", "F32")]
)
def test_matrices_are_rounded_as_the_gguf_package_rounds(
    sources, tmp_path, monkeypatch, kind, tensor_type
):
    """In pieces of a few rows as well as at once."""
    for name, pieces in (("table_chunks", table_chunks), ("row_chunks", row_chunks)):
        monkeypatch.setattr(source_module, name, functools.partial(pieces, chunk_bytes=5_000))
    checkpoint = for_gguf(open_checkpoint(sources("gemma3", "float32")))
    calls = []
    write_gguf(checkpoint, tmp_path / "m.gguf", kind, on_progress=lambda *call: calls.append(call))
    assert len(calls) > 2 * len(checkpoint.weights)
    assert calls[-1][0] == calls[-1][1]
    tensor_type = gguf.GGMLQuantizationType[tensor_type]
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    read = open_checkpoint(tmp_path / "m.gguf").weights
    for name, spec in checkpoint.weights.specs.items():
        array = np.ascontiguousarray(spec.to_file(checkpoint.weights[name], "gguf"))
        own_type = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else tensor_type
        expected = gguf.quantize(array, own_type)
        assert theirs[spec.gguf].tensor_type == own_type
        np.testing.assert_array_equal(theirs[spec.gguf].data, expected, err_msg=name)
        values = gguf.dequantize(expected, own_type)
        np.testing.assert_array_equal(read[name], spec.from_file(values, "gguf"))
        ulp = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-6, "f32": 2**-23}[kind]
        assert np.abs(values - array).max() <= ulp * np.abs(array).max()


@pytest.mark.parametrize("name", [s.name for s in SIZES.values() if s.causal and not s.alias_of])
def test_every_published_size_is_said_by_gguf(name):
    config = named_config(name)
    metadata = config_to_gguf(config)
    vocabulary = {"tokenizer.ggml.tokens": range(config.vocabulary_size)}
    assert config_from_gguf(metadata | vocabulary, tied_head=True) == config


def _uneven(config):
    first = dataclasses.replace(config.layers[0], ffw_dim=64)
    return dataclasses.replace(config, layers=(first, *config.layers[1:]))


def _other_order(config):
    return dataclasses.replace(config, layers=config.layers[::-1])


def _capped(config):
    return dataclasses.replace(config, final_soft_cap=30.0)


def _uncapped(config):
    return dataclasses.replace(config, final_soft_cap=None)


def _third(config):
    return dataclasses.replace(config, norm_epsilon=1 / 3)


@pytest.mark.parametrize(
    ("generation", "change"),
    [
        ("gemma3", _uneven),
        ("gemma3", _other_order),
        ("gemma", _capped),
        ("gemma2", _uncapped),
        ("gemma3", _third),
    ],
)
def test_an_architecture_that_gguf_cannot_say_is_refused(sources, tmp_path, generation, change):
    checkpoint = for_gguf(open_checkpoint(sources(generation, "float32")))
    config_to_gguf(checkpoint.config)  # the change is what is refused
    changed = dataclasses.replace(checkpoint, config=change(checkpoint.config))
    with pytest.raises(ConfigError, match=f"cannot be written as GGUF of type {generation}"):
        write_gguf(changed, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_what_else_the_formats_cannot_say_is_refused(sources, tmp_path):
    checkpoint = open_checkpoint(sources("gemma3", "float32"))
    with pytest.raises(ConfigError, match="query scale"):
        write_gguf(checkpoint, tmp_path / "m.gguf")
    untied = for_gguf(open_checkpoint(sources("gemma2", "float32", False)))
    with pytest.raises(ConfigError, match="cannot store a separate head for a gemma2"):
        write_gguf(untied, tmp_path / "m.gguf")
    uneven = dataclasses.replace(checkpoint, config=_uneven(checkpoint.config))
    with pytest.raises(ConfigError, match=r"cannot be written as a Hugging Face config\.json"):
        write_safetensors_folder(uneven, tmp_path / "out")
    narrow = dataclasses.replace(
        for_gguf(checkpoint).config, hidden_dim=80, embedding_scale=80**0.5
    )
    with pytest.raises(ConfigError, match=r"token_embedding has rows of 80, not a multiple of"):
        write_gguf(dataclasses.replace(checkpoint, config=narrow), tmp_path / "m.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


# --- the tokenizer in GGUF -----------------------------------------------------------------------


def user_defined(model):
    """With a run of spaces and one of newlines that the text is searched for."""
    parsed = proto.ModelProto.FromString(model)
    for piece, text in zip(parsed.pieces[-2:], ("\u2581\u2581", "\n\n"), strict=True):
        piece.piece, piece.type, piece.score = text, piece.USER_DEFINED, -1000.0
    return parsed.SerializeToString()


def test_the_vocabulary_comes_back_as_the_same_tokenizer():
    model = user_defined(tiny_tokenizer_model())
    metadata = tokenizer_metadata(model, 305)
    assert metadata["tokenizer.ggml.tokens"][298:301] == ["  ", "\n\n", "[PAD300]"]
    rebuilt = build_sentencepiece_model(metadata)
    first, second = (sentencepiece.SentencePieceProcessor(model_proto=m) for m in (model, rebuilt))
    assert second.vocab_size() == 305
    for name in ("bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(first, name)() == getattr(second, name)()
    for text in (TEXT, "a   b\n\n\n\n c", "[PAD300] <bos>", "é漢🙂\0"):
        assert first.encode(text) == second.encode(text)
        assert second.decode(second.encode(text)) == first.decode(first.encode(text))
    exact = tokenizer_metadata(model, 300)
    again = build_sentencepiece_model(exact)
    assert tokenizer_metadata(again, 300) == exact


def _unigram(parsed):
    parsed.trainer_spec.model_type = parsed.trainer_spec.UNIGRAM


def _prefix(parsed):
    parsed.normalizer_spec.add_dummy_prefix = True


def _no_end(parsed):
    parsed.trainer_spec.eos_id = -1


def _too_long(parsed):
    parsed.pieces.add(piece="zzz", score=-1e3, type=1)


BAD_TOKENIZERS = {
    _unigram: "not a BPE model",
    _prefix: "normalizes text before",
    _no_end: r"lacks the eos token|lacks the beginning-of-sequence or end-of-sequence token",
    _too_long: "the tokenizer has 301 tokens, but the model's vocabulary has 300",
}


@pytest.mark.parametrize("change", BAD_TOKENIZERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_tokenizer_that_is_not_gemmas_is_refused(sources, tmp_path, writer, change):
    checkpoint = for_gguf(open_checkpoint(sources("gemma", "float32")))
    parsed = proto.ModelProto.FromString(checkpoint.tokenizer_model)
    change(parsed)
    bad = dataclasses.replace(checkpoint, tokenizer_model=parsed.SerializeToString())
    with pytest.raises(CheckpointError, match=BAD_TOKENIZERS[change]):
        WRITERS[writer](bad, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_damaged_tokenizer_and_one_without_turns_are_refused(sources, tmp_path, writer):
    checkpoint = for_gguf(open_checkpoint(sources("gemma", "float32")))
    for change, match in (
        ({"tokenizer_model": b"\xff\xff\xff"}, "not a SentencePiece model"),
        ({"instruction_tuned": True}, "lacks the tokens of the turn template"),
    ):
        with pytest.raises(CheckpointError, match=match):
            WRITERS[writer](dataclasses.replace(checkpoint, **change), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- llama.cpp -----------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.peer
@pytest.mark.parametrize("generation", GENERATIONS)
def test_llama_cpp_runs_a_small_model_as_transformers_does(sources, tmp_path, generation):
    checkpoint = for_gguf(open_checkpoint(sources(generation, "float32", generation != "gemma3")))
    tokenizer = user_defined(checkpoint.tokenizer_model)
    checkpoint = dataclasses.replace(checkpoint, tokenizer_model=tokenizer)
    write_safetensors_folder(checkpoint, tmp_path / "hf", "float32")
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32")
    texts = [TEXT, "a  b", "\n\n\nc", "é漢🙂"]
    found = llama(tmp_path / "m.gguf", IDS, texts=texts)
    expected = logits(load(tmp_path / "hf"))
    assert expected.std() > 2
    np.testing.assert_allclose(
        found["logits"], expected, atol=0.05
    )  # its GELU is a table of float16
    ours = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    assert found["encoded"] == [[2, *ours.encode(text)] for text in texts]


PROMPT = "The three primary colors are"
NEW_TOKENS = 24
NEAR_TIE = 0.1  # between the two greatest logits, of which one then is as good as the other


def greedy(folder):
    """Of transformers on a folder: the prompt's ids, those that follow, and their margins."""
    model = load(folder)
    prompt = transformers.AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    found = model.generate(
        **prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best, second = torch.cat(found.logits).topk(2).values.T
    ids = prompt["input_ids"][0].tolist()
    return ids, found.sequences[0].tolist()[len(ids) :], (best - second).numpy()


@needs_llama_cpp
@pytest.mark.sample
@pytest.mark.peer
def test_the_sample_written_runs_in_transformers_and_llama_cpp(tmp_path, record_property):
    from tests.gemma_keras.test_tokenizer import STRINGS

    sample = open_checkpoint("sample")
    write_safetensors_folder(sample, tmp_path / "hf", "float32")
    ids, expected, margins = greedy(tmp_path / "hf")
    clear = margins > NEAR_TIE
    certain = NEW_TOKENS if clear.all() else int(clear.argmin())  # tokens before the first near-tie
    assert clear.sum() > 20 and certain > 5
    for kind in ("f16", "q8_0"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(sample, path, kind)
        again = open_checkpoint(path)
        assert again.config == sample.config
        assert again.tokenizer_model == sample.tokenizer_model
        found = llama(path, ids, expected, NEW_TOKENS, [PROMPT])
        assert found["encoded"] == [ids]
        assert found["answer"][:certain] == expected[:certain]
        best = np.array(found["best"][len(ids) - 1 : -1])
        np.testing.assert_array_equal(best[clear], np.array(expected)[clear])
        record_property(
            f"sample as {kind}",
            f"{path.stat().st_size / 1e6:.0f} MB; llama.cpp agrees in "
            f"{(best == expected).sum()} of {NEW_TOKENS} tokens after transformers' own, and "
            f"{'is' if found['answer'] == expected else 'is not'} equal when it goes on by itself",
        )
    texts = [text for group in STRINGS.values() for text in group]
    ours = llama(tmp_path / "q8_0.gguf", texts=texts)["encoded"]
    assert ours == llama(sample_path(), texts=texts)["encoded"]  # which another program wrote
    processor = sentencepiece.SentencePieceProcessor(model_proto=sample.tokenizer_model)
    cut = {text: found for text, found in zip(texts, ours, strict=True) if "\u2581" not in text}
    assert len(cut) > 3_800  # U+2581 is no space for llama.cpp
    assert cut == {text: [2, *processor.encode(text)] for text in cut}
