"""The reader of ONNX files beside the onnx package."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edge_demo.bundle.graph_weights import bytes_per_token, stored_weights
from edge_demo.errors import BundleError

GRAPHS = ("engine.onnx", "candidates.onnx", "model.onnx")


@pytest.fixture(params=["gemma2-fp32", "gemma3-int8"])
def bundle(request, tiny_bundles) -> Path:
    return tiny_bundles / request.param


@pytest.mark.parametrize("file", GRAPHS)
def test_it_finds_what_onnx_finds(bundle, file):
    graph = onnx.load(bundle / file, load_external_data=False).graph
    users = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    expected = {}
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and tensor.name in users:
            size = (int(place.get("offset", "0")), int(place["length"]))
            expected[tensor.name] = (tuple(tensor.dims), *size, users[tensor.name])
    found = stored_weights(bundle / file)
    assert len(found) == len(expected) > 20
    assert {w.name: (w.shape, w.offset, w.num_bytes, set(w.used_by)) for w in found} == expected


@pytest.mark.parametrize("file", GRAPHS)
def test_on_arm_two_sums_are_read_beside_each_scale_of_8_bits(bundle, file):
    graph = onnx.load(bundle / file, load_external_data=False).graph
    widths = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            (bits,) = (entry.i for entry in node.attribute if entry.name == "bits")
            widths |= {name: max(bits, widths.get(name, 0)) for name in node.input}
    weights, more = stored_weights(bundle / file), 0
    for weight in weights:
        assert weight.bits == widths.get(weight.name, 0)
        if weight.bits == 8 and weight.name.endswith(".scales"):
            more += 2 * weight.num_bytes
            assert weight.read_bytes("arm64") == 3 * weight.num_bytes
        else:
            assert weight.read_bytes("aarch64") == weight.num_bytes
        assert weight.read_bytes("x86_64") == weight.num_bytes
    found = bytes_per_token(bundle / file, "aarch64")
    assert found == bytes_per_token(bundle / file, "x86_64") + more
    assert (more > 0) == ("int8" in bundle.name)


def test_the_engine_reads_all_and_looks_nothing_up(bundle):
    """Rows of the embedding are read beside the graph."""
    weights = stored_weights(bundle / "engine.onnx")
    assert all(w.multiplied and not w.looked_up for w in weights)
    assert len({w.offset for w in weights}) == len(weights)
    assert bytes_per_token(bundle / "engine.onnx") == sum(w.num_bytes for w in weights)


def test_candidates_look_nothing_up_and_read_no_low_plane(tiny_bundles):
    """The device reads its rows: see `edge_demo.engine.low_plane`."""
    path = tiny_bundles / "gemma3-int8" / "candidates.onnx"
    weights = stored_weights(path)
    assert all(w.multiplied and not w.looked_up for w in weights)
    table = {w.name for w in weights if w.name.startswith("token_embedding.")}
    assert table == {"token_embedding.high", "token_embedding.scales"}
    assert bytes_per_token(path) == sum(w.num_bytes for w in weights)


def test_a_token_reads_all_but_what_is_looked_up(tiny_bundles):
    """The table of these bundles is embedding and head at once, and only the head reads it whole."""
    path = tiny_bundles / "gemma3-int8" / "model.onnx"
    weights = stored_weights(path)
    tables = [w for w in weights if w.looked_up and not w.multiplied]
    assert tables and {w.offset for w in tables} < {w.offset for w in weights if w.multiplied}
    assert bytes_per_token(path) == sum({w.offset: w.num_bytes for w in weights}.values())


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_a_graph_that_is_cut_short_is_refused(bundle, tmp_path, keep):
    data = (bundle / "engine.onnx").read_bytes()
    path = tmp_path / "engine.onnx"
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(BundleError, match=r"engine\.onnx is not a valid ONNX graph"):
        stored_weights(path)


@pytest.mark.parametrize("data", [b"", b"no graph", b"\xff" * 40, b"\x3a\x00\x3a\x00", b"\x38\x01"])
def test_what_is_no_graph_is_refused(tmp_path, data):
    path = tmp_path / "engine.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="not a valid ONNX graph"):
        stored_weights(path)
