"""Stored integers as standard operators, by value, on bytes packed here by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.errors import ExportRequestError
from export.formats.formats import Format
from export.graph.dequantize import check_format, dequantized_matrix, dequantized_rows
from export.graph.nodes import OPSET, Nodes
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import WeightSpec

ROWS = 24
EXACT, AS_IT_COMES = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, None
each_bits = pytest.mark.parametrize("bits", [8, 4])
symmetric_or_not = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
# whole blocks, an odd number of them, and a last one that is padded
each_width = pytest.mark.parametrize("width", [64, 96, 80])


def pack(levels, bits):
    """Along the last axis; two 4-bit integers a byte, low half first, a row ends with its byte."""
    if bits == 8:
        return levels.astype(np.uint8)
    if levels.shape[-1] % 2:
        levels = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, 1)], constant_values=9)
    return (levels[..., ::2] | levels[..., 1::2] << 4).astype(np.uint8)


class Stored:
    """A table of random integers in a weights file, and what it means."""

    def __init__(self, folder, bits, symmetric, width, block_size=32):
        rng = np.random.default_rng(0)
        self.fmt = Format(bits, block_size)
        self.spec = WeightSpec("token_embedding", (ROWS, width), "table", "", "")
        num_blocks = -(-width // block_size)
        levels = rng.integers(0, 1 << bits, (ROWS, num_blocks, block_size))
        zeros = np.full((ROWS, num_blocks), 1 << (bits - 1))
        if not symmetric:
            zeros = rng.integers(0, 1 << bits, zeros.shape)
        scales = rng.uniform(0.5, 1.5, zeros.shape).astype(np.float32)
        values = (levels - zeros[..., None]) * scales[..., None]
        self.values = values.reshape(ROWS, -1)[:, :width].astype(np.float32)
        self.file = WeightsFile(folder / "data")
        with self.file as file:
            packed = pack(levels, bits)
            file.add("token_embedding.quantized", packed)
            file.add_view(
                "token_embedding.rows", "token_embedding.quantized", (ROWS, packed[0].size)
            )
            file.add("token_embedding.scales", scales)
            if not symmetric:
                file.add("token_embedding.zero_points", pack(zeros, bits))
        self.path = folder / "graph.onnx"

    def run(self, build, inputs, rank, level):
        """What `build(nodes, *graph inputs)` of that rank computes from the arrays `inputs`."""
        nodes = Nodes(self.file)
        values = [
            ir.val(f"x{i}", ir.DataType.from_numpy(a.dtype), [f"x{i}.{d}" for d in range(a.ndim)])
            for i, a in enumerate(inputs)
        ]
        output = build(nodes, *values)
        output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape([f"y.{d}" for d in range(rank)])
        ir.save(nodes.model(values, [output]), self.path)
        onnx.checker.check_model(str(self.path), full_check=True)
        options = ort.SessionOptions()
        if level is not AS_IT_COMES:
            options.graph_optimization_level = level
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        options.optimized_model_filepath = str(self.path.with_name("optimized.onnx"))
        options.log_severity_level = 3  # that such a file fits this machine only
        session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return session.run(None, {f"x{i}": array for i, array in enumerate(inputs)})[0]

    def product(self, x, level):
        def build(nodes, x):
            return nodes.op("y", "MatMul", [x, dequantized_matrix(nodes, self.spec, self.fmt)])

        return self.run(build, [x], 2, level)


@each_bits
@symmetric_or_not
@each_width
@pytest.mark.parametrize("level", [EXACT, AS_IT_COMES], ids=["as written", "optimized"])
def test_a_product_with_the_matrix(tmp_path, bits, symmetric, width, level):
    stored = Stored(tmp_path, bits, symmetric, width)
    x = np.random.default_rng(1).normal(size=(3, width)).astype(np.float32)
    expected = x @ stored.values.T
    np.testing.assert_allclose(
        stored.product(x, level), expected, rtol=0, atol=1e-5 * expected.std()
    )


@each_bits
@symmetric_or_not
def test_onnxruntime_runs_the_product_on_the_packed_weights(tmp_path, bits, symmetric):
    stored = Stored(tmp_path, bits, symmetric, 96)
    stored.product(np.ones((1, 96), np.float32), AS_IT_COMES)
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node] == ["MatMulNBits"]


@each_bits
@symmetric_or_not
@each_width
def test_rows_of_the_table(tmp_path, bits, symmetric, width):
    stored = Stored(tmp_path, bits, symmetric, width)
    ids = np.array([[0, 5, ROWS - 1], [7, 7, 1]], np.int64)

    def build(nodes, ids):
        return dequantized_rows(nodes, stored.spec, stored.fmt, ids)

    for level in (EXACT, AS_IT_COMES):
        np.testing.assert_array_equal(stored.run(build, [ids], 3, level), stored.values[ids])
    # the table itself is read by Gather alone
    graph = onnx.load(stored.path, load_external_data=False).graph
    readers = {
        node.op_type for node in graph.node for name in node.input if name.startswith("token_emb")
    }
    wide = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert "Gather" in readers and len(wide) == 1


@each_bits
@symmetric_or_not
@each_width
def test_a_table_that_is_the_head_too(tmp_path, bits, symmetric, width):
    """Both ways to read it in one graph, as a tied embedding is read."""
    stored = Stored(tmp_path, bits, symmetric, width)
    ids = np.array([[3, 0], [8, 8]], np.int64)

    def build(nodes, ids):
        rows = dequantized_rows(nodes, stored.spec, stored.fmt, ids)
        matrix = dequantized_matrix(nodes, stored.spec, stored.fmt)
        scaled = nodes.op("y", "Mul", [rows, nodes.constant(np.array(2, np.float32))])
        return nodes.op("y", "MatMul", [scaled, matrix])

    expected = 2 * stored.values[ids] @ stored.values.T
    for level in (EXACT, AS_IT_COMES):
        found = stored.run(build, [ids], 3, level)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())


def test_the_graph_says_nothing_but_standard_operators(tmp_path):
    stored = Stored(tmp_path, 4, False, 80)
    stored.product(np.ones((1, 80), np.float32), EXACT)
    model = onnx.load(stored.path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}


def test_other_bits_are_refused():
    check_format("layers.0.mlp.up", Format(4, 32))
    with pytest.raises(ExportRequestError, match=r"layers\.0\.mlp\.up in 2 bits.*--lowering fused"):
        check_format("layers.0.mlp.up", Format(2, 32))


def test_bytes_read_in_a_shape_they_do_not_fill_are_refused(tmp_path):
    with WeightsFile(tmp_path / "data") as file:
        file.add("x", np.zeros((3, 8), np.uint8))
    assert file.initializer("x", ir.DataType.UINT4, (3, 16)).shape == (3, 16)
    with pytest.raises(ValueError, match="does not have 24 bytes"):
        file.initializer("x", ir.DataType.UINT4, (3, 8))


def test_a_weight_cannot_slip_into_the_graph(tmp_path):
    with WeightsFile(tmp_path / "data") as file:
        nodes = Nodes(file)
    with pytest.raises(AssertionError, match="too large"):
        nodes.constant(np.zeros(1 << 15, np.float32))
