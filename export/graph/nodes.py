"""Builds a graph of standard operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edge_demo.bundle.manifest import TensorSpec
from export.graph.weights_file import WeightsFile

OPSET = 21  # the first whose DequantizeLinear knows blocks and 4-bit integers
_IR_VERSION = 10
_MOST_CONSTANT_BYTES = 1 << 16


def graph_value(spec: TensorSpec) -> ir.Value:
    """An input of a graph, as the contract has it."""
    return ir.val(spec.name, ir.DataType.from_numpy(np.dtype(spec.dtype)), spec.shape)


class Nodes:
    """A graph in the order its nodes are added.

    Constants of equal value are kept once; names say where a node belongs and count what is there,
    so that the same calls give the same graph, byte for byte.

    Args:
        weights: the file that weights stay in.
    """

    def __init__(self, weights: WeightsFile) -> None:
        self.weights = weights
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._counts: dict[str, int] = {}

    def op(self, scope: str, op_type: str, inputs: Sequence[ir.Value], **attributes) -> ir.Value:
        """Add a node of one output; returns that."""
        return self.ops(scope, op_type, inputs, 1, **attributes)[0]

    def ops(
        self, scope: str, op_type: str, inputs: Sequence[ir.Value], count: int, **attributes
    ) -> Sequence[ir.Value]:
        """Add a node of `count` outputs; returns them."""
        name = self._fresh(f"{scope}.{op_type}")
        suffixes = ["", *(f":{i}" for i in range(1, count))]
        outputs = [ir.val(name + suffix) for suffix in suffixes]
        self._nodes.append(ir.node(op_type, inputs, attributes, outputs=outputs, name=name))
        return outputs

    def copy(
        self, scope: str, node: ir.Node, inputs: Sequence[ir.Value | None]
    ) -> Sequence[ir.Value]:
        """Add a node like one of another graph, over other inputs; returns its outputs."""
        if node.domain:
            raise AssertionError(f"{node.domain}::{node.op_type} is not a standard operator")
        name = self._fresh(f"{scope}.{node.op_type}")
        suffixes = ["", *(f":{i}" for i in range(1, len(node.outputs)))]
        copied = ir.Node(
            "",
            node.op_type,
            inputs,
            [node.attributes[key] for key in sorted(node.attributes)],
            outputs=[ir.val(name + suffix) for suffix in suffixes],
            name=name,
        )
        self._nodes.append(copied)
        return copied.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        """A small constant that stays in the graph."""
        if array.nbytes > _MOST_CONSTANT_BYTES:
            raise AssertionError(f"a constant of shape {array.shape} is too large for the graph")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._fresh("constant")
            tensor = ir.tensor(array, name=name)
            value = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
            self._constants[key] = self._initializers[name] = value
        return self._constants[key]

    def stored(
        self, name: str, dtype: ir.DataType | None = None, shape: Sequence[int] | None = None
    ) -> ir.Value:
        """A tensor of the weights file; its type and shape may be others over the same bytes.

        Under another type it has a name of its own, so that one graph can read it as both.
        """
        own = self.weights.tensors[name]
        dtype = own.dtype if dtype is None else dtype
        label = name if dtype == own.dtype else f"{name}.{dtype.name.lower()}"
        if label not in self._initializers:
            self._initializers[label] = self.weights.initializer(name, dtype, shape, label)
        return self._initializers[label]

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """The graph as a model."""
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name="gemma",
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="gemma-keras")

    def _fresh(self, name: str) -> str:
        count = self._counts[name] = self._counts.get(name, 0) + 1
        return name if count == 1 else f"{name}.{count}"
