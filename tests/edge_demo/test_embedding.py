"""Rows of the embedding table as the device reads them, against what onnxruntime makes of them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.manifest import EmbeddingSpec, StoredPart
from edge_demo.bundle.reader import Bundle
from edge_demo.engine.batch_decoder import BatchDecoder
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import BundleError, EdgeError, RequestError
from tests.models import GENERATIONS, VOCABULARY_SIZE

EMBEDDED = "embedded.scaled"  # what the interchange graph's first block takes


# --- of exported models --------------------------------------------------------------------------


def table_of(path: Path) -> EmbeddingTable:
    bundle = Bundle.open(path)
    return EmbeddingTable(path / bundle.weights, bundle.embedding)


def interchange_rows(path: Path, ids) -> np.ndarray:
    """What `model.onnx` embeds ids as, by its own first nodes."""
    model = onnx.load(path / "model.onnx", load_external_data=False)
    needed, nodes = {EMBEDDED}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.insert(0, node)
            needed.update(node.input)
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(EMBEDDED))
    for kept in (model.graph.initializer, model.graph.input):
        used = [entry for entry in kept if entry.name in needed]
        del kept[:]
        kept.extend(used)
    start = path / "start.onnx"
    onnx.save(model, start)
    try:
        session = ort.InferenceSession(start, providers=["CPUExecutionProvider"])
    finally:
        start.unlink()
    mask = np.ones((1, len(ids)), np.int64)
    feed = {"input_ids": np.array([ids], np.int64), "attention_mask": mask}
    return session.run([EMBEDDED], feed)[0][0]


@pytest.mark.parametrize(
    "name",
    [f"{g}-{r}" for g in GENERATIONS for r in ("fp32", "int8")] + ["wide-rows", "wide-board-int8"],
)
def test_every_row_is_the_interchange_graphs_to_the_last_bit(tiny_bundles, name):
    path = tiny_bundles / name
    ids = list(range(VOCABULARY_SIZE))
    found = table_of(path).rows(ids)
    assert found.dtype == np.float32 and found.shape == (VOCABULARY_SIZE, 96)
    assert found.tobytes() == interchange_rows(path, ids).tobytes()
    assert np.abs(found).min(axis=0).max() > 0


# --- of any format -------------------------------------------------------------------------------

FLOATS = [(bits, 0, True, 1) for bits in (32, 16)]
INTEGERS = [
    (bits, block_size, symmetric, 1)
    for bits, block_size, symmetric in itertools.product((8, 4, 2), (16, 32, 128), (True, False))
]
PLANES = [(8, block_size, False, 2) for block_size in (16, 64, 256)]


def write_table(path, bits, block_size, symmetric, planes, width, num_rows=7, seed=0):
    """A table of random bytes, one part after another; its spec and parts."""
    spec = EmbeddingSpec(num_rows, width, bits, block_size, symmetric, planes, 3.7, {})
    rng = np.random.default_rng(seed)
    parts, places, data = {}, {}, b"not the table"
    for name, (dtype, row_bytes) in spec.layout.items():
        if dtype == "uint8":
            array = rng.integers(0, 256, (num_rows, row_bytes), np.uint8)
        else:
            array = rng.normal(size=(num_rows, row_bytes // np.dtype(dtype).itemsize)).astype(dtype)
        parts[name], places[name] = array, StoredPart(len(data), dtype)
        data += array.tobytes()
    path.write_bytes(data)
    return dataclasses.replace(spec, parts=places), parts


def onnxruntime_rows(spec, parts, ids):
    """The same rows from a graph of the nodes that the exporter writes."""
    helper = onnx.helper
    nodes, values = [], {}

    def gather(levels, bits, out):
        names = [levels, "ids", "scales"]
        if "zero_points" in parts and levels != "high":
            names.append("zero_points")
        nodes.append(
            helper.make_node(
                "GatherBlockQuantized", names, [out], domain="com.microsoft", bits=bits,
                block_size=spec.block_size, gather_axis=0, quantize_axis=1,
            )
        )  # fmt: skip

    if not spec.block_size:
        nodes.append(helper.make_node("Gather", ["rows", "ids"], ["stored"]))
        nodes.append(helper.make_node("Cast", ["stored"], ["wide"], to=onnx.TensorProto.FLOAT))
    elif spec.planes == 2:
        values["steps"] = np.array(16, np.float32)
        gather("high", 4, "high_rows")
        gather("low", 4, "low_rows")
        nodes.append(helper.make_node("Mul", ["high_rows", "steps"], ["high16"]))
        nodes.append(helper.make_node("Add", ["high16", "low_rows"], ["wide"]))
    else:
        gather("quantized", spec.bits, "wide")
    values["scale"] = np.array(spec.scale, np.float32)
    nodes.append(helper.make_node("Mul", ["wide", "scale"], ["out"]))
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["n", None])],
        [onnx.numpy_helper.from_array(array, name) for name, array in (parts | values).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.array(ids, np.int64)})[0][:, : spec.width]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    fmt=st.sampled_from([*FLOATS, *INTEGERS, *PLANES]),
    width=st.integers(1, 300),
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_any_format_is_dequantized_as_onnxruntime_does(tmp_path_factory, fmt, width, ids, seed):
    """Last blocks that are not full among them, of which the weights file holds the padding."""
    path = tmp_path_factory.getbasetemp() / "table"
    spec, parts = write_table(path, *fmt, width, seed=seed)
    found = EmbeddingTable(path, spec).rows(ids)
    assert found.dtype == np.float32 and found.shape == (len(ids), width)
    assert found.tobytes() == np.ascontiguousarray(onnxruntime_rows(spec, parts, ids)).tobytes()


def test_numbers_beyond_float32_are_infinite_without_a_word(tmp_path, recwarn):
    spec, parts = write_table(tmp_path / "table", 8, 32, True, 2, 64)
    data = (tmp_path / "table").read_bytes()
    huge = np.full_like(parts["scales"], 3e38).tobytes()
    (tmp_path / "table").write_bytes(data.replace(parts["scales"].tobytes(), huge))
    parts["scales"][:] = 3e38
    found = EmbeddingTable(tmp_path / "table", spec).rows([1, 2])
    np.testing.assert_array_equal(found, onnxruntime_rows(spec, parts, [1, 2]))
    assert not np.isfinite(found).all() and not recwarn.list


def test_ids_may_be_any_integers_and_come_twice(tmp_path):
    spec, _ = write_table(tmp_path / "table", 4, 32, False, 1, 64)
    table = EmbeddingTable(tmp_path / "table", spec)
    expected = table.rows(list(range(7)))
    for ids in ([6, 0, 6, 3, 3, 1], (2,), range(7), np.array([5, 5, 0], np.int32)):
        np.testing.assert_array_equal(table.rows(ids), expected[list(ids)])
    one = table.rows([4])
    one[:] = 0  # what is returned is the caller's
    np.testing.assert_array_equal(table.rows([4])[0], expected[4])


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 7, 1 << 40, -(1 << 70)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, bad):
    spec, _ = write_table(tmp_path / "table", 8, 32, True, 1, 64)
    table = EmbeddingTable(tmp_path / "table", spec)
    with pytest.raises(RequestError, match=f"token id {bad} is outside the vocabulary of 7"):
        table.rows([0, bad])


def test_rows_of_texts_refuse_such_an_id_before_anything_runs(tiny_bundles):
    bundle = Bundle.open(tiny_bundles / "gemma3-fp32")
    for kind in (Engine, CandidateEngine):
        engine = kind(bundle, threads=1)
        engine.prefill([5, 6, 7])
        rows = BatchDecoder(engine, 2)
        for row in range(2):
            rows.put(row, engine.snapshot())
        with pytest.raises(RequestError, match=f"token id {VOCABULARY_SIZE} is outside"):
            rows.decode({0: 5, 1: VOCABULARY_SIZE})
        assert rows.lengths == [3, 3]
        assert set(rows.decode({0: 5, 1: 6})) == {0, 1}


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    spec, _ = write_table(tmp_path / "table", 8, 32, True, 1, 64)
    with pytest.raises(BundleError, match="elsewhere cannot be read: No such file"):
        EmbeddingTable(tmp_path / "elsewhere", spec)


@pytest.mark.parametrize("fmt", [FLOATS[0], INTEGERS[1], PLANES[0]])
def test_a_file_that_was_cut_while_it_was_open_is_told(tmp_path, fmt):
    path = tmp_path / "table"
    spec, _ = write_table(path, *fmt, 64)
    table = EmbeddingTable(path, spec)
    os.truncate(path, path.stat().st_size - 1)
    assert table.rows([0, 1]).shape == (2, 64)
    for ids in ([6], [0, 6]):
        with pytest.raises(BundleError, match="table is too short for its embeddings"):
            table.rows(ids)


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    spec, _ = write_table(tmp_path / "table", 8, 32, True, 1, 64)
    table = EmbeddingTable(tmp_path / "table", spec)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(EdgeError, match="table cannot be read: Input/output error"):
        table.rows([1])


def test_a_read_that_fails_leaves_the_engine_as_it_was(tiny_bundles, monkeypatch):
    engine = Engine(Bundle.open(tiny_bundles / "gemma3-int8"), threads=1)
    engine.prefill([5, 6, 7])
    expected = engine.decode(8).copy()
    engine.rewind(3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: b"")
        for run in (lambda: engine.prefill([8, 9]), lambda: engine.decode(8)):
            with pytest.raises(BundleError, match="is too short for its embeddings"):
                run()
    assert engine.tokens == [5, 6, 7]
    np.testing.assert_array_equal(engine.decode(8), expected)


def test_the_file_is_closed_with_the_table(tmp_path):
    spec, _ = write_table(tmp_path / "table", 8, 32, True, 1, 64)
    table = EmbeddingTable(tmp_path / "table", spec)
    file = table._file
    os.fstat(file)
    del table
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
