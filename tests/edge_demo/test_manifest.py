"""Every entry of `bundle.json` as it must not be."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.manifest import EMBEDDER_VERSION, FORMAT_VERSION
from edge_demo.bundle.reader import Bundle
from edge_demo.errors import EdgeError
from tests.edge_demo.bundle_files import (
    assert_refused,
    copy_bundle,
    edit_manifest,
    read_manifest,
    use,
)


def test_no_such_folder_and_a_folder_that_is_no_bundle_are_told_apart(tmp_path):
    assert_refused(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
    assert_refused(tmp_path, tmp_path, "is not a bundle", "bundle.json")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "is a file", f"folder, {tmp_path}")
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
        (b" " * (20 << 20), "too large for a bundle manifest"),
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


@pytest.mark.parametrize("version", [0, 3, EMBEDDER_VERSION + 1, "4", 4.0, None, [4]])
def test_another_version_is_refused_by_number(damaged, version):
    edit_manifest(damaged, lambda m: m.update(format_version=version))
    assert_refused(
        damaged, f"version {version!r}", f"reads 4, {FORMAT_VERSION} and {EMBEDDER_VERSION}"
    )


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


@pytest.mark.parametrize("value", [5, None, [], {}, True, "", "x" * 33, "Pi 5", "a\nb"], ids=repr)
def test_a_target_that_is_no_name_is_refused(damaged, value):
    edit_manifest(damaged, lambda m: m.update(target=value))
    assert_refused(damaged, "bundle.json", "damaged", "not the name of a target")


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
        (PLANES | {"bits": 4}, {}, "format of the embedding is not supported"),
        ({"planes": 2}, {}, "format of the embedding is not supported"),
        ({"planes": 0}, {}, "format of the embedding is not supported"),
        ({"bits": 16}, {}, "format of the embedding is not supported"),
        ({"bits": 3}, {}, "format of the embedding is not supported"),
        ({"block_size": 24}, {}, "format of the embedding is not supported"),
        ({"block_size": 512}, {}, "format of the embedding is not supported"),
        ({"block_size": 0}, {}, "format of the embedding is not supported"),
        ({"block_size": 0, "bits": 16}, {"rows": FLOATS}, "format must be rows"),
        (
            {"block_size": 0, "bits": 16, "symmetric": False},
            {},
            "format of the embedding is not supported",
        ),
        (
            {"block_size": 0, "bits": 32, "planes": 2},
            {},
            "format of the embedding is not supported",
        ),
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
    assert_refused(damaged, "bundle.json", f"300 rows, but the vocabulary size is {size:,}")


@pytest.mark.parametrize("role", ["engine", "candidates"])
def test_an_embedding_whose_rows_a_graph_does_not_take_is_refused(damaged, role):
    edit_manifest(damaged, lambda m: m["graphs"][role]["inputs"][0]["shape"].__setitem__(2, 97))
    assert_refused(
        damaged, "bundle.json", f"96 numbers, which does not match the input of {role}.onnx"
    )


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
