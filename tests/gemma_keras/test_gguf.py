"""Our GGUF reader against the `gguf` package: values, meaning, and files that want to hurt it."""

from __future__ import annotations

import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras import GemmaConfig, LayerSpec, open_checkpoint
from gemma_keras.checkpoints.gguf import file as reader
from gemma_keras.checkpoints.gguf.config import config_from_gguf
from gemma_keras.checkpoints.gguf.file import GGUFFile
from gemma_keras.checkpoints.gguf.reader import read_gguf
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.opening.sample import sample_path
from gemma_keras.errors import CheckpointError, ConfigError, ModelError
from tests import gguf_files
from tests.gguf_files import F32, Raw, pack_gguf, pack_info, pack_model, pack_text, pack_value
from tests.models import GEMMA_JINJA

Type = gguf.GGMLQuantizationType
QUANTIZABLE = [
    getattr(Type, name)
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
]
NO_DEQUANTIZATION = [
    getattr(Type, name) for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")
]
DEQUANTIZABLE = [kind for kind in Type if kind not in NO_DEQUANTIZATION]
LAYERS = {"gemma": 2, "gemma2": 3, "gemma3": 7}


def _equal_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, except that one NaN is as good as another."""
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


def _as_gguf_reads(tensor: gguf.ReaderTensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        values = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
    return values.reshape([int(n) for n in reversed(tensor.shape)])


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZABLE, ids=lambda kind: kind.name)
def test_a_model_of_every_type_the_package_writes_reads_as_the_package_does(kind, tmp_path):
    meta = gguf_files.metadata("gemma3", 2)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, gguf_files.tensors(meta), kind)
    file = GGUFFile(path)
    theirs = gguf.GGUFReader(path).tensors
    assert [tensor.name for tensor in theirs] == list(file.tensors)
    for tensor in theirs:
        _equal_bits(file.read(tensor.name), _as_gguf_reads(tensor))
    assert read_gguf(path).provenance["tensor_types"].keys() == {"F32", kind.name}


@pytest.mark.parametrize("stretch", [1, 7_000, 4 << 20])
@pytest.mark.parametrize("kind", DEQUANTIZABLE, ids=lambda kind: kind.name)
def test_any_blocks_of_every_type_dequantize_as_the_package_does(
    kind, stretch, tmp_path, monkeypatch
):
    """Random bytes, scales that are infinite or NaN among them, in one stretch and in many."""
    monkeypatch.setattr(reader, "_DEQUANTIZE_BYTES", stretch)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind)
    # 37 rows: the package dequantizes in groups of about 16
    blocks = rng.integers(0, 256, (37, 3 * block_bytes), dtype=np.uint8)
    if stretch == 1:
        blocks = blocks[:5]
    path = gguf_files.write_raw_blocks(tmp_path / "t.gguf", kind, blocks)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, kind)
    _equal_bits(GGUFFile(path).read("t"), expected)


@pytest.mark.parametrize("kind", NO_DEQUANTIZATION, ids=lambda kind: kind.name)
def test_a_type_that_cannot_be_dequantized_is_named(kind, tmp_path):
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    path = tmp_path / "t.gguf"
    gguf_files.write_raw_blocks(path, kind, np.zeros((2, block_bytes), np.uint8))
    with pytest.raises(CheckpointError, match=f"tensor t is of type {kind.name}"):
        GGUFFile(path).read("t")


@pytest.mark.sample
def test_tensors_of_the_sample_are_those_of_the_packages_reader():
    checkpoint, file = open_checkpoint("sample"), GGUFFile(sample_path())
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(sample_path()).tensors}
    assert set(theirs) == set(file.tensors)
    for name, kind in {
        "blk.3.attn_k.weight": "Q5_0",
        "blk.0.ffn_down.weight": "Q6_K",
        "blk.17.attn_v.weight": "Q8_0",
        "blk.9.ffn_norm.weight": "F32",
    }.items():
        assert theirs[name].tensor_type.name == kind
        _equal_bits(file.read(name), _as_gguf_reads(theirs[name]))
    key = _as_gguf_reads(theirs["blk.3.attn_k.weight"])
    np.testing.assert_array_equal(checkpoint.weights["layers.3.attention.key"], key.T)
    norm = _as_gguf_reads(theirs["blk.9.ffn_norm.weight"])
    np.testing.assert_array_equal(checkpoint.weights["layers.9.pre_ffw_norm"], norm - 1)


# --- meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_matrices_are_transposed_and_norms_lose_their_one(kind, tied, tmp_path):
    meta = gguf_files.metadata(kind, LAYERS[kind])
    arrays = gguf_files.tensors(meta, tied=tied)
    checkpoint = open_checkpoint(gguf_files.write_gguf(tmp_path / "m.gguf", meta, arrays))
    assert ("head" in checkpoint.weights) is not tied
    left = dict(arrays)
    for name, weight in checkpoint.weights.items():
        stored = left.pop(checkpoint.weights.specs[name].gguf)
        if stored.ndim == 1:
            stored = stored - 1
        elif name not in ("token_embedding", "head"):
            stored = stored.T
        np.testing.assert_array_equal(weight, stored, err_msg=name)
    assert left == {}


@pytest.mark.parametrize(
    ("name", "stored"),
    {
        "token_embedding": "token_embd",
        "layers.1.pre_attention_norm": "blk.1.attn_norm",
        "layers.1.attention.query": "blk.1.attn_q",
        "layers.1.attention.key": "blk.1.attn_k",
        "layers.1.attention.value": "blk.1.attn_v",
        "layers.1.attention.query_norm": "blk.1.attn_q_norm",
        "layers.1.attention.key_norm": "blk.1.attn_k_norm",
        "layers.1.attention.output": "blk.1.attn_output",
        "layers.1.post_attention_norm": "blk.1.post_attention_norm",
        "layers.1.pre_ffw_norm": "blk.1.ffn_norm",
        "layers.1.mlp.gate": "blk.1.ffn_gate",
        "layers.1.mlp.up": "blk.1.ffn_up",
        "layers.1.mlp.down": "blk.1.ffn_down",
        "layers.1.post_ffw_norm": "blk.1.post_ffw_norm",
        "final_norm": "output_norm",
        "head": "output",
    }.items(),
)
def test_every_weight_comes_from_its_own_tensor(name, stored, tmp_path):
    meta = gguf_files.metadata("gemma3", 2)
    arrays = gguf_files.tensors(meta, tied=False)
    checkpoint = open_checkpoint(gguf_files.write_gguf(tmp_path / "m.gguf", meta, arrays))
    expected = arrays[f"{stored}.weight"]
    np.testing.assert_array_equal(
        np.sort(checkpoint.weights[name], axis=None),
        np.sort(expected - (expected.ndim == 1), axis=None),
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_tensor_names_are_those_the_package_lists_for_the_architecture(kind):
    architecture = getattr(gguf.MODEL_ARCH, kind.upper())
    listed = {
        f"{gguf.TENSOR_NAMES[tensor].format(bid=bid)}.weight"
        for tensor in gguf.MODEL_TENSORS[architecture]
        for bid in range(LAYERS[kind])
    }
    meta = gguf_files.metadata(kind, LAYERS[kind])
    config = config_from_gguf(meta, tied_head="output.weight" not in listed)
    assert {spec.gguf for spec in weight_specs(config).values()} == listed


def test_the_configuration_is_what_was_written(tmp_path):
    def config(kind: str, **changes) -> GemmaConfig:
        meta = gguf_files.metadata(kind, LAYERS[kind], **changes)
        path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, gguf_files.tensors(meta))
        return open_checkpoint(path).config

    shared = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffw_dim": 160,
        "query_scale": 32**-0.5,
    }
    whole = {
        "vocabulary_size": 12,
        "hidden_dim": 96,
        "embedding_scale": 96**0.5,
        "norm_epsilon": 1e-5,
        "context_length": 128,
    }
    plain = LayerSpec(**shared, rope_theta=500.0)
    assert config("gemma", rope__freq_base=500.0) == GemmaConfig(layers=(plain,) * 2, **whole)

    far = LayerSpec(**shared, post_norms=True, attention_soft_cap=20.0)
    near = LayerSpec(**shared, post_norms=True, attention_soft_cap=20.0, sliding_window=16)
    caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    assert config("gemma2", **caps) == GemmaConfig(
        layers=(near, far, near), final_soft_cap=10.0, **whole
    )

    three = {**shared, "post_norms": True, "qk_norm": True}
    near = LayerSpec(**three, sliding_window=16)
    far = LayerSpec(**three, rope_theta=2e6, rope_scale=8.0)
    scaling = {
        "rope__scaling__type": "linear",
        "rope__scaling__factor": 8.0,
        "rope__freq_base": 2e6,
    }
    assert config("gemma3", **scaling) == GemmaConfig(layers=(*[near] * 5, far, near), **whole)


def test_a_turn_template_tells_an_instruction_tuned_model(tmp_path):
    meta = gguf_files.metadata("gemma", 1) | {"tokenizer.chat_template": GEMMA_JINJA}
    meta["tokenizer.ggml.tokens"][-2:] = ["<start_of_turn>", "<end_of_turn>"]
    path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, gguf_files.tensors(meta))
    checkpoint = open_checkpoint(path)
    assert checkpoint.instruction_tuned
    assert checkpoint.provenance["name"] == "tiny gemma"
    unknown = meta | {"tokenizer.chat_template": "<start_of_turn>{{ messages }}"}
    path = gguf_files.write_gguf(tmp_path / "n.gguf", unknown, gguf_files.tensors(meta))
    checkpoint = open_checkpoint(path)
    assert not checkpoint.instruction_tuned
    assert "neither Gemma's turns nor ChatML" in checkpoint.remarks[0]
    assert open_checkpoint(path, instruction_tuned=True).instruction_tuned


HUB = "https://huggingface.co/"


@pytest.mark.parametrize(
    ("keys", "base"),
    [
        ({"general.source.repo_url": HUB + "google/gemma-2b-it/"}, "google/gemma-2b-it"),
        (
            {"general.base_model.count": 1, "general.base_model.0.repo_url": HUB + "me/poet"},
            "me/poet",
        ),
        ({"general.base_model.count": 2, "general.base_model.0.repo_url": HUB + "me/poet"}, None),
        ({"general.source.url": "https://example.org/a/b"}, None),
        ({"general.source.url": HUB + "a/b\nc"}, None),
        ({}, None),
    ],
)
def test_what_a_file_says_it_was_made_from_is_kept(keys, base, tmp_path):
    meta = gguf_files.metadata("gemma", 1) | keys
    path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, gguf_files.tensors(meta))
    assert open_checkpoint(path).provenance.get("base_model") == base


def test_a_vocabulary_with_byte_pieces_encodes_any_text(tmp_path):
    import sentencepiece

    meta = gguf_files.metadata("gemma", 1) | gguf_files.vocabulary(byte_pieces=True)
    path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, gguf_files.tensors(meta))
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_proto=open_checkpoint(path).tokenizer_model
    )
    assert tokenizer.encode("  ab a", out_type=str) == ["▁▁", "ab", "▁a"]
    assert tokenizer.decode(tokenizer.encode("  aé\x00漢🙂\n\n b")) == "  aé\x00漢🙂\n\n b"


def test_opening_takes_no_memory_for_the_tensors(tmp_path):
    meta = gguf_files.metadata("gemma", 1)
    names = {name: array.shape for name, array in gguf_files.tensors(meta).items()}
    meta |= {"gemma.embedding_length": 1 << 12, "gemma.feed_forward_length": 1 << 16}
    grow = {96: 1 << 12, 160: 1 << 16}
    infos, size = [], 0
    for name, shape in names.items():
        dims = [grow.get(n, n) for n in reversed(shape)]
        infos.append(pack_info(name, dims, F32, size))
        size += 4 * int(np.prod(dims))
    assert size > 3 << 30
    path = tmp_path / "sparse.gguf"
    path.write_bytes(pack_gguf(meta, infos))
    os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    checkpoint = open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20
    assert checkpoint.weights["final_norm"].tolist() == [-1.0] * (1 << 12)


# --- damaged and hostile files ------------------------------------------------------------------


def _model(meta_changes=None, *, tied: bool = True) -> tuple[dict, dict]:
    meta = gguf_files.metadata("gemma", 1, embedding_length=32, feed_forward_length=32)
    meta |= {"gemma.attention.key_length": 16, "gemma.attention.value_length": 16}
    return meta | (meta_changes or {}), gguf_files.tensors(meta, tied=tied)


TINY = pack_model(*_model())
HEADER = TINY[: TINY.rindex(b"output_norm.weight") + 64]


def _refused(path, content: bytes, match: str | None = None) -> str:
    """The one sentence that opening and reading `content` ends with."""
    path.write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=match) as caught:
        dict(open_checkpoint(path).weights)
    message = str(caught.value)
    assert 20 < len(message) < 500 and "\n" not in message
    return message


def _read_or_refused(path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        dict(open_checkpoint(path).weights)
    except ModelError as error:
        assert str(error)


def test_our_packer_writes_what_the_package_writes(tmp_path):
    """Not a test of the reader: it shows that the files below are wrong in one thing only."""
    theirs = tmp_path / "theirs.gguf"
    gguf_files.write_gguf(theirs, *_model())
    (tmp_path / "ours.gguf").write_bytes(TINY)
    assert theirs.read_bytes() == TINY
    assert len(dict(open_checkpoint(theirs).weights)) == 11


@pytest.mark.parametrize("opener", [open_checkpoint, read_gguf])
def test_what_is_no_file_is_refused(opener, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing.gguf", "fifo", "."):
        with pytest.raises(CheckpointError, match=r"does not exist|is not a file"):
            opener(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF\x03\x00\x00\x00\x00\x00", b"PK\x03\x04" * 100, bytes(99)]
)
def test_what_is_no_gguf_is_refused(content, tmp_path):
    _refused(tmp_path / "m.gguf", content, "is not a GGUF file")


@pytest.mark.parametrize(
    ("version", "match"),
    [(1, "version 1;"), (99, "version 99;"), (0x03000000, "big-endian")],
)
def test_other_versions_are_refused(version, match, tmp_path):
    _refused(tmp_path / "m.gguf", TINY[:4] + struct.pack("<I", version) + TINY[8:], match)


def test_version_2_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(TINY[:4] + struct.pack("<I", 2) + TINY[8:])
    assert open_checkpoint(path).config == config_from_gguf(_model()[0], tied_head=True)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    positions = [*range(len(HEADER)), *range(len(HEADER), len(TINY), 131), len(TINY) - 1]
    assert len(positions) > 1_500
    for position in positions:
        message = _refused(path, TINY[:position])
        assert "truncated" in message or "is not a GGUF file" in message


@pytest.mark.sample
@pytest.mark.parametrize(
    "fraction", [1e-7, 1e-5, 0.001, 0.01, 0.02, 0.0257, 0.026, 0.2, 0.7, 0.9999999]
)
def test_the_sample_cut_anywhere_is_refused(fraction, tmp_path):
    size = sample_path().stat().st_size
    path = tmp_path / "cut.gguf"
    with sample_path().open("rb") as whole:  # past the header a hole will do
        path.write_bytes(whole.read(min(int(fraction * size), 7_000_000)))
    os.truncate(path, int(fraction * size))
    with pytest.raises(CheckpointError, match=r"truncated|is not a GGUF file"):
        open_checkpoint(path)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flipped_header_byte_is_read_or_refused(mask, tmp_path):
    path = tmp_path / "m.gguf"
    for position in range(len(HEADER)):
        flipped = bytes([TINY[position] ^ mask])
        _read_or_refused(path, TINY[:position] + flipped + TINY[position + 1 :])


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, len(HEADER) - 1),
            st.sampled_from(
                [b"", b"\0", b"\xff", b"\x09", b"\xff" * 8, b"\0" * 8, bytes(7) + b"\x80"]
            )
            | st.binary(max_size=9),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_header_with_bytes_changed_put_in_or_left_out_is_read_or_refused(
    changes, tmp_path_factory
):
    content = TINY
    for position, new, removed in changes:
        content = content[:position] + new + content[position + removed :]
    _read_or_refused(tmp_path_factory.getbasetemp() / "fuzz.gguf", content)


def _key(value: bytes) -> bytes:
    return pack_text("k") + value


HUGE = struct.pack("<Q", 1 << 63)
LIES = {
    "2**63 tensors": pack_gguf({"a": 1}, [], num_tensors=1 << 63),
    "2**63 keys": pack_gguf({"a": 1}, [], num_keys=1 << 63),
    "2**40 keys": pack_gguf({"a": 1}, [], num_keys=1 << 40),
    "a key of 2**63 bytes": pack_gguf(HUGE + b"abc", [], num_keys=1),
    "a key of 70 000 bytes": pack_gguf({"a" * 70_000: 1}, []),
    "a text of 2**63 bytes": pack_gguf(_key(struct.pack("<I", 8) + HUGE), [], num_keys=1),
    "an array of 2**62 numbers": pack_gguf({"k": Raw(9, struct.pack("<IQ", 4, 1 << 62))}, []),
    "an array of 2**61 doubles": pack_gguf({"k": Raw(9, struct.pack("<IQ", 12, 1 << 61))}, []),
    "an array of 2**62 texts": pack_gguf({"k": Raw(9, struct.pack("<IQ", 8, 1 << 62))}, []),
    "nested arrays": pack_gguf({"k": Raw(9, struct.pack("<IQ", 9, 1) * 1_000)}, []),
    "an array of an unknown type": pack_gguf({"k": Raw(9, struct.pack("<IQ", 77, 1))}, []),
    "a value of an unknown type": pack_gguf({"k": Raw(77, bytes(8))}, []),
    "a key that is not UTF-8": pack_gguf(pack_text(b"\xff\xfe") + pack_value(1), [], num_keys=1),
    "a text that is not UTF-8": pack_gguf({"k": Raw(8, pack_text(b"\xc3"))}, []),
    "a key twice": pack_gguf(_key(pack_value(1)) * 2, [], num_keys=2),
    "no dimensions": pack_gguf({}, [pack_info("t", [])], bytes(64)),
    "five dimensions": pack_gguf({}, [pack_info("t", [1] * 5)], bytes(64)),
    "2**32 - 1 dimensions": pack_gguf({}, [pack_text("t") + b"\xff" * 28], bytes(64)),
    "a dimension of 0": pack_gguf({}, [pack_info("t", [0, 4])], bytes(64)),
    "a dimension of 2**63": pack_gguf({}, [pack_info("t", [1 << 63])], bytes(64)),
    "four dimensions of 2**39": pack_gguf({}, [pack_info("t", [1 << 39] * 4)], bytes(64)),
    "an offset past the end": pack_gguf({}, [pack_info("t", [4], 0, 64)], bytes(64)),
    "an offset of 2**64 - 1": pack_gguf({}, [pack_info("t", [4], 0, (1 << 64) - 1)], bytes(64)),
    "a tensor type that is unknown": pack_gguf({}, [pack_info("t", [4], 5)], bytes(64)),
    "a tensor type of 2**32 - 1": pack_gguf({}, [pack_info("t", [4], (1 << 32) - 1)], bytes(64)),
    "a row that is no whole number of blocks": pack_gguf({}, [pack_info("t", [33], 8)], bytes(64)),
    "a tensor twice": pack_gguf({}, [pack_info("t", [4])] * 2, bytes(64)),
    "a tensor name of 300 bytes": pack_gguf({}, [pack_info("t" * 300, [4])], bytes(64)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_at_once(lie, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(LIES[lie])
    tracemalloc.start()
    message = _refused(path, LIES[lie])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert "m.gguf" in message


@pytest.mark.parametrize("alignment", [0, -32, 7, 12, 1 << 30, True, 32.0, "32", [32]])
def test_a_strange_alignment_is_refused(alignment, tmp_path):
    _refused(tmp_path / "m.gguf", pack_gguf({"general.alignment": alignment}, []), "alignment of")


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment_is_followed(alignment, tmp_path):
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "gemma")
    writer.add_custom_alignment(alignment)
    first, second = np.arange(3, dtype=np.float32), np.arange(5, dtype=np.float32)
    writer.add_tensor("first", first)
    writer.add_tensor("second", second)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(GGUFFile(path).read("first"), first)
    np.testing.assert_array_equal(GGUFFile(path).read("second"), second)


NAN, INF = float("nan"), float("inf")
WRONG_VALUES = [
    (f"gemma.{key}", value)
    for key, values in {
        "block_count": ["one", 0, -1, 1.0, True, [1], 1 << 30],
        "embedding_length": ["x", 0, 33, [32]],
        "feed_forward_length": ["x", 0, 32.0, [32, 32], ["x"], []],
        "attention.head_count": ["x", 0, -2, 3, [4, 4]],
        "attention.head_count_kv": ["x", 0, 3, [2, 2], ["x"]],
        "attention.key_length": ["x", 0, -16, 15, NAN, [16], True],
        "attention.value_length": ["x", 0, 8, [16]],
        "attention.layer_norm_rms_epsilon": ["x", 0.0, -1.0, NAN, INF, [1.0]],
        "rope.freq_base": ["x", 0.0, -1.0, NAN, INF, [1.0]],
        "rope.scaling.type": ["yarn", 7, ["linear"]],
        "final_logit_softcapping": ["x", -1.0, NAN, INF, [30.0]],
        "context_length": ["x", 0, -1, 8.5, [8]],
    }.items()
    for value in values
] + [
    (key, value)
    for key, values in {
        "general.architecture": ["llama", "gemma4", "", 3, ["gemma"]],
        "general.name": [3, ["x"]],
        "general.license": [1.0],
        "tokenizer.chat_template": [3, ["<start_of_turn>"]],
        "tokenizer.ggml.model": ["gpt2", "bert", 1, ["llama"]],
        "tokenizer.ggml.tokens": [7, "abc", [], [1] * 12, ["a"] * 12, ["a", "b"], [""] * 12],
        "tokenizer.ggml.scores": ["x", 1.0, [1.0], [1.0] * 13, [1] * 12, ["x"] * 12, [NAN] * 12],
        "tokenizer.ggml.token_type": [3, [3], [1.0] * 12, [0] * 12, [9] * 12, [-1] * 12, [6] * 12, [2] * 12],
        "tokenizer.ggml.bos_token_id": [10**9, 12, -1, "two", 2.0, True, [2]],
        "tokenizer.ggml.unknown_token_id": [10**9, "three"],
        "tokenizer.ggml.padding_token_id": [12],
        "tokenizer.ggml.eos_token_id": [-1],
    }.items()
    for value in values
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=lambda part: str(part)[:40])
def test_a_metadata_value_that_is_wrong_is_refused(key, value, tmp_path):
    meta, arrays = _model({key: value})
    _refused(tmp_path / "m.gguf", pack_model(meta, arrays))


@pytest.mark.parametrize("value", ["x", -1, NAN, [1], True])
@pytest.mark.parametrize(
    "key", ["attention.sliding_window", "rope.freq_base_swa", "rope.scaling.factor"]
)
def test_a_value_that_is_wrong_for_gemma3_is_refused(key, value, tmp_path):
    meta = gguf_files.metadata("gemma3", 1, rope__scaling__type="linear", rope__scaling__factor=8.0)
    arrays = gguf_files.tensors(meta)
    _refused(tmp_path / "m.gguf", pack_model(meta | {f"gemma3.{key}": value}, arrays))


@pytest.mark.parametrize("value", ["x" * 100_000, ["x"] * 10_000], ids=["text", "array"])
@pytest.mark.parametrize(
    "key", ["general.alignment", "general.name", "gemma.rope.freq_base", "tokenizer.ggml.model", "tokenizer.ggml.bos_token_id"]
)  # fmt: skip
def test_a_long_value_makes_no_long_message(key, value, tmp_path):
    meta, arrays = _model({key: value} if key != "general.name" else {key: ["x"] * 10_000})
    _refused(tmp_path / "m.gguf", pack_model(meta, arrays), key.split(".")[-1])


@pytest.mark.parametrize("key", sorted(_model()[0]))
def test_a_missing_key_is_refused_or_has_a_default(key, tmp_path):
    meta, arrays = _model()
    del meta[key]
    optional = ("general.name", "_token_id", "key_length", "value_length")
    content = pack_model(meta, arrays)
    if key.endswith(optional):
        _read_or_refused(tmp_path / "m.gguf", content)
    else:
        _refused(tmp_path / "m.gguf", content)


@pytest.mark.parametrize("name", _model()[1])
def test_a_missing_tensor_is_named(name, tmp_path):
    meta, arrays = _model()
    del arrays[name]
    _refused(tmp_path / "m.gguf", pack_model(meta, arrays), f"lacks the tensor {name}")


def test_tensors_left_over_are_named(tmp_path):
    meta, arrays = _model()
    arrays["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)
    _refused(
        tmp_path / "m.gguf", pack_model(meta, arrays), "does not have: blk.0.attn_q_norm.weight"
    )


@pytest.mark.parametrize("name", _model()[1])
def test_a_tensor_of_another_shape_is_named(name, tmp_path):
    meta, arrays = _model()
    arrays[name] = np.concatenate([arrays[name]] * 2)
    _refused(tmp_path / "m.gguf", pack_model(meta, arrays), f"tensor {name} has shape")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.ffn_up.weight"]
)
def test_a_weight_that_is_not_finite_is_named(name, value, tmp_path):
    meta, arrays = _model()
    arrays[name].flat[-1] = value
    _refused(
        tmp_path / "m.gguf",
        pack_model(meta, arrays),
        f"tensor {name} holds values that are not finite",
    )


def test_a_scale_that_is_not_finite_is_named(tmp_path):
    meta, arrays = _model()
    path = gguf_files.write_gguf(tmp_path / "m.gguf", meta, arrays, Type.Q8_0)
    content = bytearray(path.read_bytes())
    start = GGUFFile(path).tensors["blk.0.ffn_up.weight"].start
    content[start : start + 2] = np.float16(np.inf).tobytes()
    _refused(path, bytes(content), "tensor blk.0.ffn_up.weight holds values that are not finite")
