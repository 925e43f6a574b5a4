"""Hugging Face folders written and read again, by us and by transformers."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import transformers

from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.gguf.file import GGUFFile
from gemma_keras.checkpoints.gguf.writer import write_gguf
from gemma_keras.checkpoints.hf.writer import write_safetensors_folder
from gemma_keras.errors import CheckpointError
from gemma_keras.text.chat import encode_chat
from tests.gemma_keras.writers import TYPES, for_gguf, load, logits, same_bits, stored
from tests.models import GENERATIONS, TEXT, chat_tokenizer_model


@pytest.mark.parametrize("max_shard_bytes", [1, 60_000, 2 << 30])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_folder_comes_back_bit_for_bit(sources, tmp_path, generation, dtype, max_shard_bytes):
    source = sources(generation, dtype)
    checkpoint = open_checkpoint(source)
    calls = []
    write_safetensors_folder(
        checkpoint,
        tmp_path / "out",
        dtype,
        max_shard_bytes,
        on_progress=lambda *call: calls.append(call),
    )
    expected = stored(source)
    same_bits(stored(tmp_path / "out"), expected)
    total = sum(array.nbytes for array in expected.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    again = open_checkpoint(tmp_path / "out")
    assert again.config == checkpoint.config
    assert again.tokenizer_model == checkpoint.tokenizer_model
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    largest = max(array.nbytes for array in expected.values())
    if max_shard_bytes == 1:
        assert len(shards) == len(expected)
    elif max_shard_bytes == 60_000:
        assert 1 < len(shards) < len(expected)
        assert max(shards) < max(max_shard_bytes, largest) + 4_000
    else:
        assert len(shards) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float32", True), ("float32", False), ("bfloat16", True)]
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_transformers_gives_the_same_logits(sources, tmp_path, generation, dtype, tied):
    source = sources(generation, dtype, tied)
    write_safetensors_folder(open_checkpoint(source), tmp_path / "out", dtype, 60_000)
    model = load(tmp_path / "out")
    assert model.dtype == TYPES[dtype]
    assert model.config.tie_word_embeddings is tied
    expected = logits(load(source))
    assert np.ptp(expected) > 4
    np.testing.assert_array_equal(logits(model), expected)


def test_transformers_finds_the_same_tokens_and_the_end(sources, tmp_path):
    checkpoint = open_checkpoint(sources("gemma3", "float32"))
    write_safetensors_folder(checkpoint, tmp_path / "out", "float32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model)
    for text in (TEXT, "  two  spaces", "é😀\n\tx", ""):
        assert theirs(text)["input_ids"] == [2, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 1, 0)
    assert theirs.chat_template is None


def test_a_tuned_model_has_its_turns_and_notices(sources, tmp_path):
    checkpoint = dataclasses.replace(
        open_checkpoint(sources("gemma3", "bfloat16")),
        tokenizer_model=chat_tokenizer_model(),
        instruction_tuned=True,
    )
    checkpoint = dataclasses.replace(checkpoint, notices={"TERMS.html": b"<p>\xc3\xa9"})
    write_safetensors_folder(checkpoint, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").instruction_tuned
    assert (tmp_path / "out" / "TERMS.html").read_bytes() == b"<p>\xc3\xa9"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turn = [{"role": "user", "content": "Hi"}]
    text = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    expected = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert text == expected
    conversation = [{"role": "system", "content": "Be brief."}, *turn]
    conversation += [{"role": "assistant", "content": " Yes. "}, *turn]
    ids = theirs.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    assert encode_chat(checkpoint.tokenizer_model, conversation) == ids
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 298]

    path = tmp_path / "tuned.gguf"
    write_gguf(for_gguf(checkpoint), path)
    assert open_checkpoint(path).instruction_tuned
    metadata = GGUFFile(path).metadata
    assert metadata["tokenizer.ggml.eot_token_id"] == 298
    assert metadata["gemma_keras.notice.TERMS.html"] == "<p>é"


def test_a_model_without_a_tokenizer_is_a_folder_without_one(sources, tmp_path):
    source = sources("gemma2", "float32")
    checkpoint = dataclasses.replace(open_checkpoint(source), tokenizer_model=None)
    write_safetensors_folder(checkpoint, tmp_path / "out", "float32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    np.testing.assert_array_equal(logits(load(tmp_path / "out")), logits(load(source)))
    with pytest.raises(CheckpointError, match="no tokenizer, and GGUF needs its vocabulary"):
        write_gguf(for_gguf(checkpoint), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_floats_of_16_bits_are_the_nearest(sources, tmp_path, dtype, numpy_dtype):
    checkpoint = open_checkpoint(sources("gemma", "float32"))
    weights = dict(checkpoint.weights)
    # ties to even, the smallest numbers, the greatest
    odd = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e-40, -1e-7, 0, 65504]
    weights["final_norm"][: len(odd)] = odd
    write_safetensors_folder(
        dataclasses.replace(checkpoint, weights=weights), tmp_path / "out", dtype
    )
    specs = checkpoint.weights.specs
    same_bits(
        stored(tmp_path / "out"),
        {specs[n].hf: specs[n].to_file(a, "hf").astype(numpy_dtype) for n, a in weights.items()},
    )
