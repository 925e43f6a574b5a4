"""The candidates graph finds the greatest logits of a vocabulary that is searched group by group."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.engine import low_plane
from edge_demo.engine.low_plane import LowPlane
from export.formats.formats import Format
from export.formats.round_to_nearest import round_to_nearest
from export.graph import fused
from export.graph.contract import WEIGHTS_FILE, candidates_contract, engine_contract, ropes
from export.graph.fused import build_graph
from export.graph.store_weights import embedding_spec, store_weights
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig, LayerSpec

VOCABULARY = 64 * 300  # more groups of 64 than there are candidates
LENGTH, POSITIONS = 9, [0, 3, 8]
TABLES = {
    "fp32": Format(32),
    "int8": Format(8, 32),
    "two planes": Format(8, 64, symmetric=False, planes=2),
}
CONFIG = GemmaConfig(
    vocabulary_size=VOCABULARY,
    hidden_dim=64,
    layers=(LayerSpec(num_heads=2, num_kv_heads=1, head_dim=16, ffw_dim=96, query_scale=0.3),) * 2,
    embedding_scale=8.0,
    final_soft_cap=20.0,
)


def weights():
    rng = np.random.default_rng(0)
    return {
        spec.name: (rng.normal(size=spec.shape) * (0.1 if spec.kind == "matrix" else 0.5)).astype(
            np.float32
        )
        for spec in weight_specs(CONFIG).values()
    }


def run(path, contract, table, batch_size=2):
    """Outputs of a first call, by name."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (batch_size, LENGTH))
    feed = {
        "inputs_embeds": table.rows(ids.ravel().tolist()).reshape(*ids.shape, -1),
        "seqlens_k": np.full(batch_size, LENGTH - 1, np.int32),
        "total_sequence_length": np.array(LENGTH, np.int32),
        "logit_positions": np.array(POSITIONS),
    }
    for rope in ropes(CONFIG).values():
        angles = np.arange(LENGTH)[:, None] * rope.theta ** (-np.arange(rope.dims) / rope.dims)
        feed[f"{rope.name}.cos"] = np.cos(angles).astype(np.float32)
        feed[f"{rope.name}.sin"] = np.sin(angles).astype(np.float32)
    for spec in contract.inputs:
        if spec.name.startswith("past"):
            feed[spec.name] = np.zeros((batch_size, 1, LENGTH, 16), np.float32)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in contract.outputs if not spec.name.startswith("present")]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.fixture(scope="module", params=TABLES)
def outputs(request, tmp_path_factory):
    """The table's format, and what both graphs over it return."""
    fmt = TABLES[request.param]
    return fmt, outputs_of(fmt, tmp_path_factory.mktemp("candidates"))


def outputs_of(fmt, folder):
    plan = {
        spec.name: fmt if spec.kind == "table" else Format(32)
        for spec in weight_specs(CONFIG).values()
        if spec.kind != "norm"
    }
    with WeightsFile(folder / WEIGHTS_FILE) as file:
        store_weights(CONFIG, weights(), plan, file, lambda done, total: None)
    spec = embedding_spec(CONFIG, plan, file)
    table, found = EmbeddingTable(file.path, spec), {"low plane": None}
    contracts = [engine_contract(CONFIG), candidates_contract(CONFIG)]
    if fmt.planes == 2:
        contracts.insert(0, candidates_contract(CONFIG, low_plane_apart=True))
        found["low plane"] = LowPlane(file.path, spec, CONFIG.final_soft_cap)
    for contract in contracts:
        path = folder / contract.file
        ir.save(build_graph(CONFIG, plan, file, contract, LENGTH), path)
        onnx.checker.check_model(path)
        outputs = run(path, contract, table)
        if "candidate_hidden" in outputs:
            outputs["ids apart"] = outputs.pop("candidate_ids")
        found |= outputs
    return found


def test_they_are_256_different_tokens(outputs):
    _, found = outputs
    shape = 2, len(POSITIONS), 256
    assert found["candidate_ids"].shape == found["candidate_logits"].shape == shape
    assert {len(set(row.tolist())) for row in found["candidate_ids"].reshape(-1, 256)} == {256}
    assert found["candidate_ids"].min() >= 0
    assert found["candidate_ids"].max() < VOCABULARY


@pytest.mark.parametrize("outputs", ["fp32", "int8"], indirect=True)
def test_the_greatest_of_one_table_are_exactly_those_of_all_logits(outputs):
    _, found = outputs
    best = np.argsort(-found["logits"], axis=-1)[..., :256]
    np.testing.assert_array_equal(np.sort(found["candidate_ids"]), np.sort(best))
    own = np.take_along_axis(found["logits"], found["candidate_ids"], axis=-1)
    # Tanh over few numbers and over many may round the last bit differently.
    np.testing.assert_allclose(found["candidate_logits"], own, rtol=1e-6)


@pytest.mark.parametrize("outputs", ["two planes"], indirect=True)
def test_the_high_plane_proposes_the_best_and_both_score_them(outputs):
    _, found = outputs
    best = np.argsort(-found["logits"], axis=-1)[..., :20]
    for row, expected in zip(
        found["candidate_ids"].reshape(-1, 256), best.reshape(-1, 20), strict=True
    ):
        assert set(expected.tolist()) <= set(row.tolist())
    # The engine's logits round the low plane's activations to 8 bits, the candidates' do not.
    own = np.take_along_axis(found["logits"], found["candidate_ids"], axis=-1)
    difference = np.abs(found["candidate_logits"] - own)
    assert 0 < difference.max() < 0.01 * found["logits"].std()


@pytest.mark.parametrize("outputs", ["two planes"], indirect=True)
def test_the_device_adds_the_low_plane_as_the_graph_does(outputs):
    _, found = outputs
    plane, num_ids = found["low plane"], 256
    np.testing.assert_array_equal(found["ids apart"], found["candidate_ids"])
    rows = list(np.ndindex(found["ids apart"].shape[:2]))
    # More rows than are kept at once (1,024 of 64 numbers each): some are read again.
    for row in rows * 2:
        ids, high = found["ids apart"][row], found["candidate_high"][row]
        logits = plane.logits(ids, high, found["candidate_hidden"][row])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, found["candidate_logits"][row], rtol=2e-6, atol=2e-6)
        assert np.abs(logits - high).max() > 0.05  # the low plane says something
        again = plane.logits(ids, high, found["candidate_hidden"][row])
        np.testing.assert_array_equal(again, logits)
    assert len(rows) * num_ids > 1024


def test_rows_that_were_forgotten_are_read_again(tmp_path, monkeypatch):
    """Whatever was asked before, a row gives the same bits."""
    monkeypatch.setattr(low_plane, "KEPT_BYTES", 0)
    plane = outputs_of(TABLES["two planes"], tmp_path)["low plane"]
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=CONFIG.hidden_dim).astype(np.float32)
    first = rng.choice(VOCABULARY, 256, replace=False)
    expected = plane.logits(first, np.zeros(256, np.float32), hidden)
    for number in range(12):
        # partly the first ones, so that rows are kept, missing and forgotten in one call
        others = rng.choice(VOCABULARY, 256, replace=False)
        ids = np.concatenate([first[: 20 * number], others[20 * number :]])
        found = plane.logits(ids, np.zeros(256, np.float32), hidden)
        np.testing.assert_array_equal(found[: 20 * number], expected[: 20 * number])


@pytest.mark.parametrize(
    "fmt", [*TABLES.values(), Format(16), Format(4, 32, symmetric=False)], ids=str
)
def test_a_large_table_is_several_matrices_in_this_graph_alone(fmt, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = outputs_of(fmt, tmp_path / "whole")
    parts_of_head = (fmt.high_plane, fmt.low_plane) if fmt.planes == 2 else (fmt,)
    size, *low = (f.num_bytes(VOCABULARY, CONFIG.hidden_dim) for f in parts_of_head)
    monkeypatch.setattr(fused, "_MOST_PACKED", int(size / 6.5))  # seven, the last one smaller
    (tmp_path / "parts").mkdir()
    parts = outputs_of(fmt, tmp_path / "parts")
    for name, expected in whole.items():
        if name == "low plane":
            continue
        np.testing.assert_array_equal(parts[name], expected)
    heads = {}
    for file in ("engine.onnx", "candidates.onnx"):
        graph = onnx.load(tmp_path / "parts" / file, load_external_data=False).graph
        sizes = {
            tensor.name: int(entry.value)
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "length"
        }
        sizes |= {n.output[0]: sizes.get(n.input[0]) for n in graph.node if n.op_type == "Cast"}
        products = [n for n in graph.node if n.op_type in ("MatMulNBits", "FusedMatMul")]
        heads[file] = [sum(sizes.get(name, 0) for name in n.input) for n in products]
    assert heads["engine.onnx"] == [size, *low]
    assert len(heads["candidates.onnx"]) == 7
    assert sum(heads["candidates.onnx"]) == size
    assert max(heads["candidates.onnx"]) > min(heads["candidates.onnx"])


def test_the_table_is_read_as_it_was_stored(outputs):
    """Of tokens that differ in the table only, the logits differ as its rows do."""
    fmt, found = outputs
    table = weights()["token_embedding"]
    if fmt.quantized:
        table = round_to_nearest(table, fmt).values(fmt, CONFIG.hidden_dim)
    uncapped = 20.0 * np.arctanh(found["candidate_logits"].astype(np.float64) / 20.0)
    ids, logits = found["candidate_ids"].reshape(-1, 256), uncapped.reshape(-1, 256)
    for row, values in zip(ids, logits, strict=True):
        # 256 equations for the 64 numbers of the hidden state: they agree, or the rows are others
        hidden, *_ = np.linalg.lstsq(table[row].astype(np.float64), values, rcond=None)
        close = 0.03 if fmt.quantized else 1e-4  # activations are rounded too
        assert np.abs(table[row] @ hidden - values).max() < close * values.std()
