"""Checkpoints written and read again, by us and by the strangers that they are written for."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2 as proto

from gemma_keras import GemmaConfig, open_checkpoint
from gemma_keras.checkpoints import unfinished
from gemma_keras.checkpoints.gguf import GGUFFile
from gemma_keras.checkpoints.gguf_config import config_from_gguf, config_to_gguf
from gemma_keras.checkpoints.gguf_writer import write_gguf
from gemma_keras.checkpoints.safetensors_writer import write_safetensors_folder
from gemma_keras.checkpoints.sample import sample_path
from gemma_keras.checkpoints.sentencepiece_model import (
    build_sentencepiece_model,
    tokenizer_metadata,
)
from gemma_keras.checkpoints.source import row_pieces, table_pieces
from gemma_keras.config import NAMED_SIZES
from gemma_keras.errors import CheckpointError, ConfigError
from tests.export.test_bad_input import NAMESPACE
from tests.models import GENERATIONS, TEXT, tiny_hf, tiny_tokenizer_model

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IDS = [2, 5, 90, 200, 280, 281, 282, 150, 151, 30, 31, 32, 33, 34, 260, 261, 262]
WRITERS = {"safetensors": write_safetensors_folder, "gguf": write_gguf}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The Hugging Face folder of a generation and dtype, made once."""
    folder = tmp_path_factory.mktemp("sources")

    @functools.cache
    def make(generation, dtype, tied=True):
        path = folder / f"{generation}-{dtype}-{tied}"
        tiny_hf(generation, tied=tied).to(TYPES[dtype]).save_pretrained(path)
        (path / "tokenizer.model").write_bytes(tiny_tokenizer_model())
        return path

    return make


def for_gguf(checkpoint):
    """The same with the query scale that GGUF has no key for."""
    layers = tuple(
        dataclasses.replace(layer, query_scale=layer.head_dim**-0.5)
        for layer in checkpoint.config.layers
    )
    config = dataclasses.replace(checkpoint.config, layers=layers)
    return dataclasses.replace(checkpoint, config=config)


def stored(folder):
    """Name to array of all safetensors in a folder, in the dtype of the file."""
    arrays = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert name not in arrays
                arrays[name] = file.get_tensor(name)
    return arrays


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


# --- safetensors ---------------------------------------------------------------------------------


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


def with_turns(checkpoint):
    """Instruction-tuned, with the turn template's tokens in place of the last two pieces."""
    model = proto.ModelProto.FromString(checkpoint.tokenizer_model)
    for piece, name in zip(model.pieces[-2:], ("<start_of_turn>", "<end_of_turn>"), strict=True):
        piece.piece, piece.type = name, piece.CONTROL
    return dataclasses.replace(
        checkpoint, tokenizer_model=model.SerializeToString(), instruction_tuned=True
    )


def test_a_tuned_model_has_its_turns_and_notices(sources, tmp_path):
    checkpoint = with_turns(open_checkpoint(sources("gemma3", "bfloat16")))
    checkpoint = dataclasses.replace(checkpoint, notices={"TERMS.html": b"<p>\xc3\xa9"})
    write_safetensors_folder(checkpoint, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").instruction_tuned
    assert (tmp_path / "out" / "TERMS.html").read_bytes() == b"<p>\xc3\xa9"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turn = [{"role": "user", "content": "Hi"}]
    text = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    expected = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert text == expected
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 299]

    path = tmp_path / "tuned.gguf"
    write_gguf(for_gguf(checkpoint), path)
    assert open_checkpoint(path).instruction_tuned
    metadata = GGUFFile(path).metadata
    assert metadata["tokenizer.ggml.eot_token_id"] == 299
    assert metadata["gemma_keras.notice.TERMS.html"] == "<p>é"


def test_a_model_without_a_tokenizer_is_a_folder_without_one(sources, tmp_path):
    source = sources("gemma2", "float32")
    checkpoint = dataclasses.replace(open_checkpoint(source), tokenizer_model=None)
    write_safetensors_folder(checkpoint, tmp_path / "out", "float32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    np.testing.assert_array_equal(logits(load(tmp_path / "out")), logits(load(source)))
    with pytest.raises(CheckpointError, match="GGUF needs its vocabulary"):
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


# --- GGUF ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("kind", "tensor_type"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("f32", "F32")]
)
def test_matrices_are_rounded_as_the_gguf_package_rounds(
    sources, tmp_path, monkeypatch, kind, tensor_type
):
    """In pieces of a few rows as well as at once."""
    for name, pieces in (("table_pieces", table_pieces), ("row_pieces", row_pieces)):
        monkeypatch.setattr(unfinished, name, functools.partial(pieces, piece_bytes=5_000))
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


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_every_published_size_is_said_by_gguf(name):
    config = GemmaConfig.named(name)
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
    with pytest.raises(ConfigError, match="no head of its own for a gemma2"):
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
    _prefix: "changes text before",
    _no_end: r"no eos token|lacks the tokens that begin or end",
    _too_long: "the tokenizer has 301 pieces, the model's vocabulary 300",
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
        ({"instruction_tuned": True}, "lacks the tokens that begin or end"),
    ):
        with pytest.raises(CheckpointError, match=match):
            WRITERS[writer](dataclasses.replace(checkpoint, **change), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what can go wrong on the way ----------------------------------------------------------------


@pytest.fixture
def tiny(sources):
    return for_gguf(open_checkpoint(sources("gemma3", "bfloat16")))


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_target_that_is_taken(tiny, tmp_path, writer):
    target = tmp_path / "out"
    writer(tiny, target)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"out exists already; choose another"):
        writer(tiny, target)
    assert contents(tmp_path) == before
    zeros = {name: np.zeros_like(array) for name, array in tiny.weights.items()}
    writer(dataclasses.replace(tiny, weights=zeros), target, overwrite=True)
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after != before
    assert not open_checkpoint(target).weights["layers.1.mlp.up"].any()


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_target_of_another_kind_is_not_overwritten(tiny, tmp_path, writer):
    folder = tmp_path / "letters"
    (folder / "to").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("dear")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="will not be overwritten"):
        writer(tiny, folder, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_checkpoint_may_replace_the_one_it_is_read_from(tiny, tmp_path, writer):
    writer(tiny, tmp_path / "out")
    before = contents(tmp_path)
    again = open_checkpoint(tmp_path / "out")
    again = dataclasses.replace(again, provenance=tiny.provenance)
    writer(again, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_unknown_types_are_named(tiny, tmp_path, writer):
    with pytest.raises(CheckpointError, match=r"is 'int3'; choose one of .*16"):
        writer(tiny, tmp_path / "out", "int3")
    with pytest.raises(CheckpointError, match="max_shard_bytes must be positive, found 0"):
        write_safetensors_folder(tiny, tmp_path / "out", max_shard_bytes=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("writer", "kind", "value"),
    [
        (write_safetensors_folder, "float16", 7e4),
        (write_safetensors_folder, "bfloat16", 3.4e38),
        (write_safetensors_folder, "float32", np.inf),
        (write_gguf, "f16", 7e4),
        (write_gguf, "bf16", 3.4e38),
        (write_gguf, "q8_0", 1e7),
        (write_gguf, "f32", np.nan),
    ],
)
def test_a_number_beyond_the_type_is_refused(tiny, tmp_path, writer, kind, value):
    weights = dict(tiny.weights)
    weights["layers.2.mlp.down"] = weights["layers.2.mlp.down"].copy()
    weights["layers.2.mlp.down"][3, 4] = value
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down holds .* write another type"):
        writer(dataclasses.replace(tiny, weights=weights), tmp_path / "out", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["token_embedding", "layers.1.attention.key", "final_norm"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_weights_that_do_not_fit_are_refused(tiny, tmp_path, writer, name):
    weights = dict(tiny.weights)
    array = weights.pop(name)
    with pytest.raises(CheckpointError, match=f"the weights lack {name}"):
        writer(dataclasses.replace(tiny, weights=weights), tmp_path / "out")
    for wrong in (array[:-1], np.concatenate([array, array]), array[..., None]):
        with pytest.raises(CheckpointError, match=f"{name} is not of the shape"):
            writer(dataclasses.replace(tiny, weights=weights | {name: wrong}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../TERMS", "config.json", "", "a/b"])
def test_a_notice_keeps_to_a_name_of_its_own(tiny, tmp_path, name):
    with pytest.raises(CheckpointError, match="must have a plain name of its own"):
        write_safetensors_folder(dataclasses.replace(tiny, notices={name: b"x"}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_an_interrupted_write_leaves_nothing(tiny, tmp_path, writer):
    names = []

    def interrupt(done, total):
        names.extend(path.name for path in tmp_path.iterdir())
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer(tiny, tmp_path / "out", on_progress=interrupt)
    assert set(names) == {f".out.{os.getpid()}.partial"}
    assert not list(tmp_path.iterdir())


# Run as `python -c SCRIPT source target writer`: killed halfway if the environment says so.
SCRIPT = """
import os, shutil, sys
from gemma_keras import open_checkpoint
from gemma_keras.checkpoints.gguf_writer import write_gguf
from gemma_keras.checkpoints.safetensors_writer import write_safetensors_folder

def told(done, total):
    if "KILL" in os.environ and done > total // 2:
        os._exit(9)

if "BLIND" in os.environ:
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50)
source, target, writer = sys.argv[1:]
write = {"safetensors": write_safetensors_folder, "gguf": write_gguf}[writer]
try:
    write(open_checkpoint(source), target, on_progress=told)
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


def run(*arguments, prefix=(), **environment):
    return subprocess.run(
        [*prefix, sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_write_leaves_is_cleared_by_the_next(sources, tiny, tmp_path, writer):
    done = run(sources("gemma", "float32"), tmp_path / "out", writer, KILL="1")
    assert done.returncode == 9, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    WRITERS[writer](tiny, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "blind", "expected"),
    [
        ("size=300k", False, "out needs about 1"),
        ("size=300k", True, "no space was left while writing out; nothing was kept there"),
        ("ro,size=1g", False, "cannot write out: Read-only file system"),
    ],
    ids=["too small", "full before the end", "not writable"],
)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_system_that_does_not_take_it(sources, tmp_path, writer, options, blind, expected):
    target = tmp_path / "disk"
    target.mkdir()
    prefix = (*NAMESPACE, options, str(target))
    if subprocess.run([*NAMESPACE, "size=1m", target, "true"], capture_output=True).returncode:
        pytest.skip("nobody may mount here")
    source = sources("gemma", "float32")  # the one here that GGUF can say
    done = run(source, "out", writer, prefix=prefix, **({"BLIND": "1"} if blind else {}))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"refused: {expected}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""  # what is left there


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_place_where_nothing_can_be_made(tiny, tmp_path, writer):
    for target in ("/proc/gemma/out", tmp_path / ("x" * 250)):
        with pytest.raises(CheckpointError, match=r"cannot write|/proc has 0 MB free"):
            writer(tiny, target)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is not a folder, so"):
        writer(tiny, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_table_is_never_whole_in_memory(tiny, tmp_path):
    class Table(dict):
        def table_pieces(self, name, piece_bytes):
            for first in range(0, 1 << 18, 1 << 14):
                yield first, np.full((1 << 14, 96), first >> 14, np.float32)

    config = dataclasses.replace(tiny.config, vocabulary_size=1 << 18)
    weights = Table(tiny.weights)
    large = dataclasses.replace(tiny, config=config, weights=weights, tokenizer_model=None)
    tracemalloc.start()
    write_safetensors_folder(large, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.3 * (1 << 18) * 96 * 4
    written = open_checkpoint(tmp_path / "out").weights
    rows = [rows[0, 0] for _, rows in table_pieces(written, "token_embedding", 4 * 96 << 14)]
    assert rows == list(range(16))


# --- llama.cpp -----------------------------------------------------------------------------------

# In a process of its own, which may crash: the AMX kernels of llama-cpp-python 0.3.36 do, on files
# that llama.cpp itself made Q8_0 as well, so nothing is repacked for them.
LLAMA = """
import json, sys
import numpy as np
import llama_cpp

path, ids, forced, count, texts = json.loads(sys.stdin.read())
defaults = llama_cpp.llama_cpp.llama_model_default_params
def without_repacking():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
llama_cpp.llama_cpp.llama_model_default_params = without_repacking
model = llama_cpp.Llama(
    path, n_ctx=256, n_threads=2, type_k=0, type_v=0, logits_all=True, verbose=False,
    vocab_only=not ids,
)
encoded = [model.tokenize(text.encode(), special=False) for text in texts]
answer, logits, best = [], [], []
if ids:
    model.eval(ids + forced)
    rows = model.scores[: len(ids + forced)]
    logits = [[float(x) for x in row[:300]] for row in rows]
    best = [int(row.argmax()) for row in rows]
    model.reset()
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        if len(answer) == count:
            break
        answer.append(int(token))
print(json.dumps({"answer": answer, "logits": logits, "best": best, "encoded": encoded}))
"""


def llama(path, ids=(), forced=(), count=0, texts=()):
    """What llama.cpp makes of a file.

    `answer` are the tokens it adds to `ids`; `logits` its first 300 at every position of `ids` and
    `forced`, `best` the greatest of all there; `encoded` the ids of `texts`.
    """
    if importlib.util.find_spec("llama_cpp") is None:  # importing it leaves a file open
        pytest.skip("llama.cpp is not installed")
    done = subprocess.run(
        [sys.executable, "-c", LLAMA],
        input=json.dumps([str(path), list(ids), list(forced), count, list(texts)]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
