"""Bundles whose files were damaged on the way, or made to deceive."""

from __future__ import annotations

import os

import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

from edge_demo.bundle.reader import Bundle
from tests.edge_demo.bundle_files import (
    assert_refused,
    edit_graph,
    edit_manifest,
    flip_byte,
    rewrite,
)

FILES = (
    "GEMMA_NOTICE.txt",
    "README.md",
    "candidates.onnx",
    "config.json",
    "engine.onnx",
    "genai_config.json",
    "generation_config.json",
    "model.onnx",
    "model.onnx_data",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def test_a_good_bundle_says_what_it_is(tiny_bundles):
    opened = Bundle.open(tiny_bundles / "gemma3-int8")
    assert (opened.name, opened.recipe, opened.vocabulary_size) == ("tiny-gemma3", "int8", 300)
    assert (opened.context_length, len(opened.ropes)) == (128, 2)
    assert set(opened.files) == set(FILES)
    assert opened.num_bytes == sum((opened.path / name).stat().st_size for name in FILES)
    assert Bundle.open(str(tiny_bundles / "short")).context_length == 16
    opened.verify(use_memory=False)


# --- its files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_missing_a_cut_and_a_longer_file_are_named(damaged, name):
    file = damaged / name
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert_refused(damaged, name, f"{len(data) - 1:,} bytes, not {len(data):,}")
    file.write_bytes(data + b"\n")
    assert_refused(damaged, name, f"{len(data) + 1:,} bytes, not {len(data):,}")
    file.unlink()
    assert_refused(damaged, name, "lacks the file")


@pytest.mark.parametrize("place", [0, 0.5, 1])
@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_noticed_and_the_file_named(damaged, name, place):
    flip_byte(damaged / name, place)
    assert_refused(damaged, name, "has changed", "SHA-256")


@pytest.mark.parametrize("size", [0, 1, 1 << 49])
def test_a_declared_size_that_lies_is_refused(damaged, size):
    edit_manifest(damaged, lambda m: m["files"]["engine.onnx"].update(bytes=size))
    assert_refused(damaged, "engine.onnx", f"not {size:,}")


@pytest.mark.parametrize("sha256", ["", "0" * 64, None, 5])
def test_a_declared_hash_that_lies_is_refused(damaged, sha256):
    edit_manifest(damaged, lambda m: m["files"]["engine.onnx"].update(sha256=sha256))
    assert_refused(damaged, "engine.onnx", "has changed")


def test_a_folder_a_pipe_and_a_link_to_nothing_are_no_files(damaged):
    file = damaged / "engine.onnx"
    file.unlink()
    file.mkdir()
    assert_refused(damaged, "engine.onnx", "is not a file")
    file.rmdir()
    os.mkfifo(file)
    assert_refused(damaged, "engine.onnx", "is not a file")
    file.unlink()
    file.symlink_to(damaged / "nothing")
    assert_refused(damaged, "engine.onnx", "lacks the file")
    file.unlink()
    file.symlink_to(file)
    assert_refused(damaged, "engine.onnx", "cannot be read")


def test_a_link_to_the_right_bytes_will_do_and_to_others_will_not(damaged, tmp_path):
    """Caches of downloads hold links."""
    for name in FILES:
        (damaged / name).rename(tmp_path / name)
        (damaged / name).symlink_to(tmp_path / name)
    Bundle.open(damaged).verify()
    flip_byte(tmp_path / "tokenizer.model")
    assert_refused(damaged, "tokenizer.model", "has changed")


def test_a_name_too_long_for_a_file_is_refused(damaged):
    edit_manifest(damaged, lambda m: m["files"].update({"x" * 300: {"bytes": 1, "sha256": ""}}))
    assert_refused(damaged, "cannot be read")


@pytest.mark.parametrize("data", [b"", b"no model", b"\n\x05abc", bytes(1000)], ids=repr)
def test_a_tokenizer_that_is_no_sentencepiece_model_is_refused(damaged, data, capfd):
    rewrite(damaged, "tokenizer.model", data)
    assert_refused(damaged, "tokenizer.model", "is not a SentencePiece model")
    assert capfd.readouterr().err == ""


def test_a_tokenizer_with_more_pieces_than_the_vocabulary_is_refused(damaged):
    model = proto.ModelProto.FromString((damaged / "tokenizer.model").read_bytes())
    model.pieces.add(piece="one more", score=-1000.0)
    rewrite(damaged, "tokenizer.model", model.SerializeToString())
    assert_refused(damaged, "tokenizer.model", "more tokens")


# --- the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"no graph", bytes(1000)], ids=["empty", "text", "zeros"])
def test_a_graph_that_is_none_is_refused_in_one_sentence(damaged, data, capfd):
    rewrite(damaged, "engine.onnx", data)
    assert_refused(damaged, "engine.onnx", "onnxruntime")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("other", ["gemma2-fp32", "gemma-fp32"])
def test_the_graph_of_another_model_is_refused(damaged, tiny_bundles, other):
    for name in ("engine.onnx", "model.onnx_data"):
        rewrite(damaged, name, (tiny_bundles / other / name).read_bytes())
    assert_refused(damaged, "engine.onnx", "does not match bundle.json")


def test_the_interchange_graph_in_place_of_the_engines_is_refused(damaged):
    edit_manifest(damaged, lambda m: m["graphs"]["engine"].update(file="model.onnx"))
    assert_refused(damaged, "model.onnx", "does not match bundle.json")


def rename_input(model):
    """In the graph and wherever it is read."""
    for node in model.graph.node:
        node.input[:] = ["others" if name == "seqlens_k" else name for name in node.input]
    next(i for i in model.graph.input if i.name == "seqlens_k").name = "others"


def widen_head(model):
    """`past_key_values.0.key` as if it had other heads."""
    name = "past_key_values.0.key"
    value = next(i for i in model.graph.input if i.name == name)
    value.type.tensor_type.shape.dim[1].dim_value = 1


def test_a_graph_with_an_input_of_another_name_is_refused(damaged):
    edit_graph(damaged, rename_input)
    assert_refused(damaged, "engine.onnx", "does not match bundle.json")


def test_a_graph_with_an_input_of_another_shape_is_refused(damaged):
    edit_graph(damaged, widen_head)
    assert_refused(damaged, "engine.onnx", "past_key_values.0.key")


def another_vocabulary(manifest):
    manifest["model"]["vocabulary_size"] = manifest["embedding"]["rows"] = 299


def another_width(manifest):
    """The manifest agrees with itself."""
    manifest["embedding"]["width"] = 95
    for role in ("engine", "candidates"):
        manifest["graphs"][role]["inputs"][0]["shape"][2] = 95


def test_a_graph_and_a_manifest_that_agree_on_what_the_engine_cannot_feed_are_refused(damaged):
    edit_graph(damaged, rename_input)

    def edit(manifest):
        inputs = manifest["graphs"]["engine"]["inputs"]
        next(i for i in inputs if i["name"] == "seqlens_k")["name"] = "others"

    edit_manifest(damaged, edit)
    assert_refused(damaged, "engine.onnx", "others")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["ropes"].clear(),
        lambda m: m["windows"].clear(),
        lambda m: m["windows"][0].update(name="window_capacity.7"),
        lambda m: m["windows"][0].update(name="capacity"),
        lambda m: m["ropes"][0].update(name="rope.7"),
        lambda m: m["ropes"][0].update(dims=8),
        another_vocabulary,
        another_width,
        lambda m: m["graphs"]["engine"]["inputs"][-1].update(dtype="float16"),
        lambda m: m["graphs"]["engine"]["inputs"][-1].update(shape="abcd"),
        lambda m: m["graphs"]["engine"]["inputs"][-1].update(shape=["batch", 3, "capacity", 32]),
        lambda m: m["graphs"]["engine"]["outputs"].pop() and None,
    ],
    ids=range(12),
)
def test_a_manifest_that_describes_another_graph_is_refused(damaged, edit):
    edit_manifest(damaged, edit)
    assert_refused(damaged, "engine.onnx")
