"""Bundles that were damaged on the way, or made to deceive."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pwd
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from edge_demo import bundle as bundle_module
from edge_demo.bundle import FORMAT_VERSION, Bundle
from edge_demo.engine import Engine
from edge_demo.errors import BundleError, EdgeError
from edge_demo.inspect import describe
from edge_demo.tokenizer import Tokenizer
from tests.edge_demo.bundle_files import (
    copy_bundle,
    declare,
    edit_graph,
    edit_manifest,
    flip_byte,
    read_manifest,
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


@pytest.fixture
def damaged(tiny_bundles, tmp_path):
    """A good bundle, to be spoiled."""
    return copy_bundle(tiny_bundles / "gemma3-fp32", tmp_path / "damaged")


@pytest.fixture
def damaged_int8(tiny_bundles, tmp_path):
    return copy_bundle(tiny_bundles / "gemma3-int8", tmp_path / "damaged")


def use(path):
    """All that a bundle is opened for."""
    opened = Bundle.open(path)
    describe(opened, verified=False)
    engine = Engine(opened, threads=1)
    logits = engine.prefill(Tokenizer(opened).encode("The"))
    assert logits.shape == (opened.vocabulary_size,)


def assert_refused(path, *words):
    with pytest.raises(BundleError) as caught:
        use(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert str(word) in message


def test_a_good_bundle_says_what_it_is(tiny_bundles):
    opened = Bundle.open(tiny_bundles / "gemma3-int8")
    assert (opened.name, opened.recipe, opened.vocabulary_size) == ("tiny-gemma3", "int8", 300)
    assert (opened.context_length, len(opened.ropes)) == (128, 2)
    assert set(opened.files) == set(FILES)
    assert opened.num_bytes == sum((opened.path / name).stat().st_size for name in FILES)
    assert Bundle.open(str(tiny_bundles / "short")).context_length == 16
    opened.verify(use_memory=False)


# --- the manifest --------------------------------------------------------------------------------


def test_no_such_folder_and_a_folder_that_is_no_bundle_are_told_apart(tmp_path):
    assert_refused(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
    assert_refused(tmp_path, tmp_path, "is not a bundle", "bundle.json")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "is not a bundle")
    (tmp_path / "bundle.json").mkdir()
    assert_refused(tmp_path, "is not a bundle")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"9" * 5000, "is not JSON"),
        (b'{"format": "gemma-keras-bundle", "format_version": ' + b"9" * 4000 + b"}", "version"),
        (b" " * (20 << 20), "larger than a manifest can be"),
        (b"[]", "gemma-keras-bundle"),
        (b"null", "gemma-keras-bundle"),
        (b'{"format": "another"}', "gemma-keras-bundle"),
        (b'{"format": "gemma-keras-bundle"}', "version None"),
    ],
    ids=range(11),
)
def test_a_manifest_that_is_none_is_refused(damaged, content, words):
    (damaged / "bundle.json").write_bytes(content)
    assert_refused(damaged, damaged / "bundle.json", words)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION - 1, FORMAT_VERSION + 1, "4", None, [4]])
def test_another_version_is_refused_by_number(damaged, version):
    edit_manifest(damaged, lambda m: m.update(format_version=version))
    assert_refused(damaged, f"version {version!r}", f"reads {FORMAT_VERSION}")


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "recipe",
        "graphs",
        "embedding",
        "ropes",
        "windows",
        "tokenizer",
        "files",
        "plan",
        "license",
    ],
)
def test_a_missing_key_is_named(damaged, key):
    edit_manifest(damaged, lambda m: m.pop(key) and None)
    assert_refused(damaged, "bundle.json", "damaged", key)


@pytest.mark.parametrize(
    "value", [True, -1, 0, 1.5, "128", None, [], 1 << 60, 10**400], ids=lambda v: repr(v)[:9]
)
@pytest.mark.parametrize("key", ["context_length", "vocabulary_size"])
def test_a_count_of_the_wrong_type_or_size_is_refused(damaged, key, value):
    edit_manifest(damaged, lambda m: m["model"].update({key: value}))
    assert_refused(damaged, "bundle.json", "damaged")


@pytest.mark.parametrize("value", [True, -1, 0, 7.5, "7", None, 128, 1 << 49], ids=repr)
def test_a_window_that_no_layer_can_have_is_refused_before_it_is_allocated(damaged, value):
    edit_manifest(damaged, lambda m: m["windows"][0].update(length=value))
    assert_refused(damaged, "bundle.json", "damaged")


@pytest.mark.parametrize(
    "value",
    [None, "x", 0, -1.0, float("nan"), float("inf"), 10**400, True],
    ids=lambda v: repr(v)[:9],
)
@pytest.mark.parametrize("key", ["theta", "scale"])
def test_a_rotary_table_that_cannot_be_made_is_refused(damaged, key, value):
    edit_manifest(damaged, lambda m: m["ropes"][0].update({key: value}))
    assert_refused(damaged, "bundle.json", "damaged")


@pytest.mark.parametrize(
    "value",
    [True, -1, 0, 3, 7.5, "8", None, [], 1 << 49, 1 << 60],
    ids=lambda v: repr(v)[:9],
)
@pytest.mark.parametrize("key", ["rows", "width", "bits", "block_size", "planes", "parts"])
def test_an_embedding_that_cannot_be_read_is_refused(damaged_int8, key, value):
    edit_manifest(damaged_int8, lambda m: m["embedding"].update({key: value}))
    assert_refused(damaged_int8, "bundle.json")


@pytest.mark.parametrize("key", ["scale", "symmetric"])
@pytest.mark.parametrize(
    "value",
    [None, "x", 0, -1.0, 5, float("nan"), float("inf"), 10**400, []],
    ids=lambda v: repr(v)[:9],
)
def test_an_embedding_of_no_scale_or_middle_is_refused(damaged_int8, key, value):
    if (key, value) == ("scale", 5):
        return
    edit_manifest(damaged_int8, lambda m: m["embedding"].update({key: value}))
    assert_refused(damaged_int8, "bundle.json", "damaged")


@pytest.mark.parametrize("key", ["offset", "dtype"])
@pytest.mark.parametrize("part", ["low", "scales"])
@pytest.mark.parametrize(
    "value", [True, -1, 0.5, "0", None, [], "float64", 10**6, 1 << 49, 1 << 60], ids=repr
)
def test_a_part_of_an_embedding_outside_the_file_is_refused(damaged_int8, part, key, value):
    edit_manifest(damaged_int8, lambda m: m["embedding"]["parts"][part].update({key: value}))
    assert_refused(damaged_int8, "bundle.json")


def test_the_end_of_an_embedding_may_be_the_files(damaged_int8):
    size = (damaged_int8 / "model.onnx_data").stat().st_size
    last = size - 300 * 48

    def put(offset):
        edit_manifest(damaged_int8, lambda m: m["embedding"]["parts"]["low"].update(offset=offset))

    put(last)
    Bundle.open(damaged_int8)
    put(last + 1)
    assert_refused(damaged_int8, "'low' up to byte", f"{size + 1:,}", f"has {size:,}")


FORMAT = {"bits": 8, "block_size": 32, "symmetric": True, "planes": 1}
PLANES = {"planes": 2, "symmetric": False}
INTEGERS, FLOATS = {"dtype": "uint8", "offset": 0}, {"dtype": "float32", "offset": 0}


@pytest.mark.parametrize(
    "changes, parts, words",
    [
        ({}, {"quantized": INTEGERS}, "scales, quantized"),
        ({}, {"quantized": INTEGERS, "scales": INTEGERS}, "parts"),
        ({}, {"quantized": INTEGERS, "scales": FLOATS, "zero_points": INTEGERS}, "parts"),
        ({"symmetric": False}, {"quantized": INTEGERS, "scales": FLOATS}, "zero_points"),
        (PLANES, {"quantized": INTEGERS, "scales": FLOATS}, "high, low, zero_points"),
        (PLANES | {"bits": 4}, {}, "no such format"),
        ({"planes": 2}, {}, "no such format"),
        ({"planes": 0}, {}, "no such format"),
        ({"bits": 16}, {}, "no such format"),
        ({"bits": 3}, {}, "no such format"),
        ({"block_size": 24}, {}, "no such format"),
        ({"block_size": 512}, {}, "no such format"),
        ({"block_size": 0}, {}, "no such format"),
        ({"block_size": 0, "bits": 16}, {"rows": FLOATS}, "the parts rows"),
        ({"block_size": 0, "bits": 16, "symmetric": False}, {}, "no such format"),
        ({"block_size": 0, "bits": 32, "planes": 2}, {}, "no such format"),
    ],
)
def test_an_embedding_whose_parts_are_not_its_formats_is_refused(
    damaged_int8, changes, parts, words
):
    edit_manifest(damaged_int8, lambda m: m["embedding"].update(FORMAT | changes, parts=parts))
    assert_refused(damaged_int8, "bundle.json", "damaged", words)


@pytest.mark.parametrize("size", [1, 299, 301, 1 << 40])
def test_an_embedding_of_another_vocabulary_is_refused(damaged, size):
    edit_manifest(damaged, lambda m: m["model"].update(vocabulary_size=size))
    assert_refused(damaged, "bundle.json", f"300 rows for a vocabulary of {size:,}")


@pytest.mark.parametrize("role", ["engine", "candidates"])
def test_an_embedding_whose_rows_a_graph_does_not_take_is_refused(damaged, role):
    edit_manifest(damaged, lambda m: m["graphs"][role]["inputs"][0]["shape"].__setitem__(2, 97))
    assert_refused(damaged, "bundle.json", f"96 numbers, which {role}.onnx does not take")


def test_where_the_embedding_lies_is_part_of_the_fingerprint(damaged_int8):
    before = Bundle.open(damaged_int8).fingerprint
    edit_manifest(damaged_int8, lambda m: m["embedding"]["parts"]["low"].update(offset=64))
    moved = Bundle.open(damaged_int8).fingerprint
    edit_manifest(damaged_int8, lambda m: m["embedding"].update(scale=2.0))
    assert len({before, moved, Bundle.open(damaged_int8).fingerprint}) == 3


NAMES = [
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "..\\x",
    "",
    ".",
    "..",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "a\nb",
    None,
    3,
    ["x"],
]


@pytest.mark.parametrize(
    "user, name",
    [(user, name) for user in ("engine", "tokenizer") for name in NAMES]
    + [("files", name) for name in NAMES if isinstance(name, str)],
    ids=ascii,
)
def test_a_name_that_leaves_the_folder_or_cannot_be_one_is_refused(damaged, user, name):
    def edit(manifest):
        if user == "engine":
            manifest["graphs"]["engine"]["file"] = name
        elif user == "tokenizer":
            manifest["tokenizer"]["file"] = name
        else:
            manifest["files"][name] = manifest["files"]["engine.onnx"]

    edit_manifest(damaged, edit)
    assert_refused(damaged, "names a file", ascii(name)[1:-1])


@pytest.mark.parametrize("user", ["engine.onnx", "tokenizer.model"])
def test_a_file_that_is_used_must_be_listed(damaged, user):
    edit_manifest(damaged, lambda m: m["files"].pop(user) and None)
    assert_refused(damaged, user, "does not list it")


VALUES = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 1, 7, 1 << 49, 1 << 60, 10**400, 0.5, 1e300, float("nan"), float("inf")]
    ),
    st.sampled_from(
        ["", "x", "..", "a/b", "\0", "\ud800", "x" * 300, "engine.onnx", "model.onnx", "batch"]
    ),
    st.sampled_from([[], {}, [[]], [1, 2], {"file": "engine.onnx"}, [None], {"": {}}]),
).map(copy.deepcopy)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_change_of_the_manifest_is_refused_or_harmless(tiny_bundles, mutant, data):
    manifest = copy.deepcopy(mutant.manifest)
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(manifest, data)
    (mutant.path / "bundle.json").write_text(json.dumps(manifest))
    try:
        use(mutant.path)
    except EdgeError as error:
        assert "\n" not in str(error)


def mutate(node, data):
    """Replace, remove or add one thing somewhere in the tree."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        child = node[key]
        if isinstance(child, dict | list) and data.draw(st.integers(0, 3)):
            node = child
            continue
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                node[key] = data.draw(VALUES)
            case "remove":
                del node[key]
            case "add" if isinstance(node, dict):
                node[data.draw(st.text(max_size=3))] = data.draw(VALUES)
            case "add":
                node.append(data.draw(VALUES))
        return


@pytest.fixture(scope="module")
def mutant(tiny_bundles, tmp_path_factory):
    """A bundle whose manifest is written again and again, and the good manifest."""
    path = copy_bundle(tiny_bundles / "chat", tmp_path_factory.mktemp("mutant") / "bundle")
    return dataclasses.replace(Bundle.open(path), manifest=read_manifest(path))


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
    assert_refused(damaged, "tokenizer.model", "more pieces")


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
    assert_refused(damaged, "engine.onnx", "bundle.json says")


def test_the_interchange_graph_in_place_of_the_engines_is_refused(damaged):
    edit_manifest(damaged, lambda m: m["graphs"]["engine"].update(file="model.onnx"))
    assert_refused(damaged, "model.onnx", "bundle.json says")


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
    assert_refused(damaged, "engine.onnx", "bundle.json says")


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


# --- the memory of checked files -----------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """The file of checked files, which even small files now go into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_module, "_ALWAYS_HASH", 1000)
    return tmp_path / "cache/gemma-keras/verified.json"


def keep_time(file, change):
    """Change a file and set its times back."""
    before = file.stat()
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["engine.onnx", "model.onnx_data", "tokenizer.model"])
def test_a_byte_changed_after_a_good_run_is_noticed_even_if_the_time_is_set_back(
    damaged, memory, name
):
    use(damaged)
    assert str((damaged / name).resolve()) in json.loads(memory.read_text())
    keep_time(damaged / name, flip_byte)
    assert_refused(damaged, name, "has changed")


def test_a_file_replaced_by_another_of_the_same_size_and_time_is_noticed(damaged, memory):
    use(damaged)

    def replace(file):
        other = file.with_suffix(".new")
        other.write_bytes(bytes(file.stat().st_size))
        other.rename(file)

    keep_time(damaged / "model.onnx_data", replace)
    assert_refused(damaged, "model.onnx_data", "has changed")


def test_a_remembered_file_is_not_read_again_unless_asked(damaged, memory):
    use(damaged)
    file = damaged / "model.onnx_data"
    flip_byte(file)
    entries = json.loads(memory.read_text())
    stat = file.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entries[str(file.resolve())][:4] = stamp  # only whoever may write the memory can do this
    memory.write_text(json.dumps(entries))
    Bundle.open(damaged).verify()
    with pytest.raises(BundleError, match="has changed"):
        Bundle.open(damaged).verify(use_memory=False)


def test_another_bundle_of_the_same_name_is_not_taken_for_the_one_that_was_checked(
    damaged, memory, tiny_bundles
):
    use(damaged)
    stale = read_manifest(damaged)["files"]["model.onnx_data"]["sha256"]
    rewrite(damaged, "model.onnx_data", bytes((damaged / "model.onnx_data").stat().st_size))
    Bundle.open(damaged).verify()
    edit_manifest(damaged, lambda m: m["files"]["model.onnx_data"].update(sha256=stale))
    assert_refused(damaged, "model.onnx_data", "has changed")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"5",
        b"[1]",
        b"[[1, 2]]",
        b'{"a": 1}',
        b"\xff",
        b"[" * 100_000,
        b"null",
        b"9" * 5000,
    ],
    ids=range(10),
)
def test_a_damaged_memory_is_ignored_and_written_anew(damaged, memory, content):
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    use(damaged)
    assert str((damaged / "model.onnx_data").resolve()) in json.loads(memory.read_text())
    flip_byte(damaged / "model.onnx_data")
    assert_refused(damaged, "model.onnx_data")


@pytest.mark.parametrize(
    "home", ["/dev/null", "/proc/nowhere", "read-only", "a folder in its place"]
)
def test_a_memory_that_cannot_be_written_costs_nothing_but_time(
    damaged, memory, monkeypatch, tmp_path, home
):
    if home == "read-only":
        home = tmp_path / "read-only"
        home.mkdir(mode=0o500)
    elif home == "a folder in its place":
        home = tmp_path / "cache"
        memory.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    use(damaged)
    use(damaged)
    flip_byte(damaged / "model.onnx_data")
    assert_refused(damaged, "model.onnx_data")
    # root may write to what is read-only, but nothing unfinished is left
    assert {path.name for path in tmp_path.rglob("verified.*")} <= {"verified.json"}


def test_a_user_without_a_home_can_run_a_bundle(damaged, memory, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container with a made-up user id
    use(damaged)
    assert not Path("~").exists()


def test_the_memory_forgets_the_oldest(damaged, memory, tmp_path):
    declared = damaged / "more.bin"
    for i in range(70):
        path = tmp_path / f"b{i}"
        path.mkdir()
        declared = path / "model.onnx_data"
        declared.write_bytes(np.random.default_rng(i).bytes(300 * 96 * 4))
        (path / "bundle.json").write_bytes((damaged / "bundle.json").read_bytes())
        edit_manifest(path, lambda m: m.update(files={}))
        declare(path, "model.onnx_data")
        for name in ("engine.onnx", "candidates.onnx", "tokenizer.model"):
            (path / name).write_bytes(b"")
            declare(path, name)
        Bundle.open(path).verify()
    entries = json.loads(memory.read_text())
    assert len(entries) == 64 and str(declared.resolve()) in entries
    assert str((tmp_path / "b0/model.onnx_data").resolve()) not in entries
