"""The traced lowering: converts the Keras code to a graph of standard ONNX operators.

A separate process traces the layers on TensorFlow (`export.graph.trace_keras`), each kind of block
once. This module joins the fragments over the stored weights, between the inputs and outputs of the
contract. It adds only what the contract requires: where a row's text ends, how the past grows, and
at which positions logits are computed.

Any ONNX runtime can run the result. It shares no code with `export.graph.fused`, so the two
lowerings check each other.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edge_demo.bundle.manifest import GraphSpec
from export.errors import ExportError, ExportRequestError
from export.formats.formats import Plan
from export.graph.contract import CANDIDATES_FILE, INTERCHANGE_FILE, num_candidates
from export.graph.dequantize import (
    check_format,
    dequantized_matrix,
    dequantized_rows,
    float32,
)
from export.graph.nodes import Nodes, graph_value
from export.graph.padding import Unpadded, moved_back, without_padding
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import head_table, weight_specs
from gemma_keras.config import GemmaConfig, LayerSpec


def build_traced_graph(
    config: GemmaConfig,
    plan: Plan,
    weights: WeightsFile,
    contract: GraphSpec,
    max_context: int,
    kv_scales: Mapping[str, np.ndarray] | None = None,
) -> ir.Model:
    """The model as one graph of standard operators that keeps `contract` and points into `weights`.

    Args:
        config: the model's.
        plan: the formats its weights were stored in.
        weights: where they are stored.
        contract: one of `export.graph.contract`.
        max_context: not used: rotary angles are computed from positions, not looked up.
        kv_scales: must be none: keys and values are kept as floats.

    Raises:
        ExportRequestError: a weight's format, or the keys' and values', has no standard operators.
        ExportError: the layers could not be traced.
        ConfigError: the model is bidirectional: what it keeps of a text changes with each token.
    """
    config.require_causal("a graph with a key-value cache")
    for name, fmt in plan.items():
        check_format(name, fmt)
    if kv_scales:
        raise ExportRequestError(
            "with standard operators keys and values are floats; remove --kv-cache-dtype, "
            "or use --lowering fused"
        )
    return _TracedGraph(config, plan, weights, contract).build()


class _TracedGraph:
    def __init__(
        self, config: GemmaConfig, plan: Plan, weights: WeightsFile, contract: GraphSpec
    ) -> None:
        self.config = config
        self.plan = plan
        self.contract = contract
        self.specs = weight_specs(config)
        self.for_engine = contract.file != INTERCHANGE_FILE
        self.inputs = {spec.name: graph_value(spec) for spec in contract.inputs}
        self.nodes = Nodes(weights)
        self.fragments = trace(config)
        self.matrices: dict[str, ir.Value] = {}
        # tokens of the call in a row, int64 (1,)
        given = self.inputs["inputs_embeds" if self.for_engine else "input_ids"]
        self.length = self.nodes.op("length", "Shape", [given], start=1, end=2)

    def build(self) -> ir.Model:
        outputs: dict[str, ir.Value] = {}
        tokens = None if self.for_engine else self._without_padding()
        start = self._start(tokens)
        pasts = self._pasts_with_room()
        hidden = self._embedded(tokens)
        kinds: dict[LayerSpec, int] = {}
        for i, layer in enumerate(self.config.layers):
            given = {"hidden": hidden, "start": start}
            for part in ("key", "value"):
                given[f"past.{part}"] = pasts[f"past_key_values.{i}.{part}"]
            kind = kinds.setdefault(layer, i)
            found = self._lay(f"block.{kind}", f"layers.{i}", given, prefix=f"layers.{i}.")
            hidden = found["hidden_out"]
            for part in ("key", "value"):
                outputs[f"present.{i}.{part}"] = found[f"present.{part}"]
        if tokens is not None:
            hidden = moved_back(self._op, self._constant, hidden, tokens)
        else:
            positions = self.inputs["logit_positions"]
            hidden = self.nodes.op("picked", "Gather", [hidden, positions], axis=1)
        logits = self._lay("head", "head", {"hidden": hidden})["logits"]
        if self.contract.file == CANDIDATES_FILE:
            count = self.nodes.constant(np.array([num_candidates(self.config)], np.int64))
            found = self.nodes.ops("candidates", "TopK", [logits, count], 2, axis=-1, sorted=0)
            outputs["candidate_logits"], outputs["candidate_ids"] = found
        else:
            outputs["logits"] = logits
        return self._model(outputs)

    def _embedded(self, tokens: Unpadded | None) -> ir.Value:
        if tokens is None:
            return self.inputs["inputs_embeds"]
        return self._lay("embed", "embedded", {"input_ids": tokens.ids})["hidden"]

    # --- what the contract adds to the model ---

    def _without_padding(self) -> Unpadded:
        return without_padding(
            self._op, self._constant, self.inputs["input_ids"], self.inputs["attention_mask"]
        )

    def _op(self, op_type: str, inputs: list[ir.Value], name: str, **attributes) -> ir.Value:
        return self.nodes.op(name, op_type, inputs, **attributes)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return self.nodes.constant(array)

    def _start(self, tokens: Unpadded | None) -> ir.Value:
        """Position of the first new token of each row, int32 `(batch,)`.

        In the engine's graph a row's text ends where `seqlens_k` says, and the new tokens are its
        last ones; but in a first call a row may end before the others, with padding after it.
        """
        op, constant = self.nodes.op, self.nodes.constant
        int32 = int(ir.DataType.INT32)
        if tokens is not None:
            return op("start", "Cast", [tokens.past], to=int32)
        total = op("start", "Add", [self.inputs["seqlens_k"], constant(np.array(1, np.int32))])
        length = op("start", "Cast", [self.length], to=int32)
        start = op("start", "Sub", [total, length])
        return op("start", "Max", [start, constant(np.array(0, np.int32))])

    def _pasts_with_room(self) -> dict[str, ir.Value]:
        """Each past with room for the new tokens: a buffer has it, a growing past is padded."""
        pasts = {n: value for n, value in self.inputs.items() if n.startswith("past_key_values.")}
        if self.for_engine:
            return pasts
        op, constant = self.nodes.op, self.nodes.constant
        before = constant(np.array([0], np.int64))
        pads = op("length", "Concat", [before, self.length], axis=0)
        zero, axis = constant(np.array(0, np.float32)), constant(np.array([2], np.int64))
        return {n: op(n, "Pad", [v, pads, zero, axis], mode="constant") for n, v in pasts.items()}

    # --- weights, as the fragments take them ---

    def _weight(self, name: str) -> ir.Value:
        """The factors of a norm, or a matrix float32 `[in, out]`; a head is one too."""
        if name not in self.matrices:
            self.matrices[name] = self._read_weight(name)
        return self.matrices[name]

    def _read_weight(self, name: str) -> ir.Value:
        if name == "head":
            name = head_table(self.config)
        spec = self.specs[name]
        fmt = self.plan.get(name)
        if fmt is not None and fmt.quantized:
            return dequantized_matrix(self.nodes, spec, fmt)
        stored = float32(self.nodes, self.nodes.stored(name), name)
        if spec.kind == "table":
            return self.nodes.op(name, "Transpose", [stored], perm=[1, 0])
        return stored

    def _rows(self, name: str, ids: ir.Value) -> ir.Value:
        """Rows of a table, float32 `(batch, length, hidden_dim)`."""
        if self.plan[name].quantized:
            return dequantized_rows(self.nodes, self.specs[name], self.plan[name], ids)
        rows = self.nodes.op(f"{name}.rows", "Gather", [self.nodes.stored(name), ids], axis=0)
        return rows if self.plan[name].bits == 32 else float32(self.nodes, rows, f"{name}.rows")

    # --- fragments ---

    def _lay(
        self, fragment: str, scope: str, given: Mapping[str, ir.Value], prefix: str = ""
    ) -> dict[str, ir.Value]:
        """Copy a fragment's nodes; its inputs that are not given are weights.

        Returns:
            Its outputs by name.
        """
        graph = ir.from_proto(onnx.ModelProto.FromString(self.fragments[fragment])).graph
        values: dict[ir.Value, ir.Value] = {}
        for value in graph.inputs:
            name = str(value.name)
            if name in given:
                values[value] = given[name]
            elif name != "token_embedding":  # of that, rows are read where they are gathered
                values[value] = self._weight(prefix + name)

        def ours(value: ir.Value | None) -> ir.Value | None:
            if value is not None and value not in values and value.const_value is not None:
                values[value] = self.nodes.constant(value.const_value.numpy())
            return None if value is None else values.get(value, value)

        for node in _in_order(graph):
            inputs = [ours(value) for value in node.inputs]
            table = next((v for v in inputs if v is not None and v.graph is graph), None)
            if table is None:
                copied = self.nodes.copy(scope, node, inputs)
            elif node.op_type == "Gather" and inputs[0] is table and inputs[1] is not None:
                copied = [self._rows(str(table.name), inputs[1])]
            else:
                raise AssertionError(f"{node.op_type} reads all of {table.name}")
            values |= dict(zip(node.outputs, copied, strict=True))
        return {str(value.name): values[value] for value in graph.outputs}

    def _model(self, outputs: Mapping[str, ir.Value]) -> ir.Model:
        for spec in self.contract.outputs:
            value = outputs[spec.name]
            value.name = spec.name
            value.dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
            value.shape = ir.Shape(spec.shape)
        return self.nodes.model(
            [self.inputs[spec.name] for spec in self.contract.inputs],
            [outputs[spec.name] for spec in self.contract.outputs],
        )


def _in_order(graph: ir.Graph) -> list[ir.Node]:
    """Returns its nodes in the order in which its outputs need them, which depends only on the
    graph's structure."""
    order: dict[ir.Node, None] = {}

    def visit(value: ir.Value | None) -> None:
        node = value.producer() if value is not None else None
        if node is not None and node not in order:
            for needed in node.inputs:
                visit(needed)
            order[node] = None

    for value in graph.outputs:
        visit(value)
    return list(order)


# The process finds the modules that this one does.
_TRACE = """
import sys
sys.path[:] = sys.argv.pop().split("\\n")
from export.graph.trace_keras import main
sys.exit(main())
"""


@functools.lru_cache(maxsize=4)
def trace(config: GemmaConfig) -> Mapping[str, bytes]:
    """Runs `export.graph.trace_keras` on a configuration; returns fragment name to ONNX model.

    Raises:
        ExportError: it failed; the message ends with its reason.
    """
    environment = os.environ | {
        "PYTHONHASHSEED": "0",  # sets of names decide the order of what tf2onnx writes
        "PYTHONWARNINGS": "ignore",
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # nothing is computed
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with tempfile.TemporaryDirectory(prefix="gemma-trace-") as folder:
        # `run` ends the process when this one is interrupted.
        done = subprocess.run(
            [sys.executable, "-c", _TRACE, folder, "\n".join(sys.path)],
            input=json.dumps(config.to_dict()),
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise ExportError(_reason(done))
        return {path.stem: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    what = "the Keras model could not be traced on TensorFlow"
    if done.returncode < 0:
        return (
            f"{what}: signal {-done.returncode} ended the process, perhaps because memory was short"
        )
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1] if said else f"exit status {done.returncode}"
    if reason.startswith("ModuleNotFoundError"):
        reason += "; run: pip install 'gemma-keras[export]'"
    return f"{what}: {reason}"
