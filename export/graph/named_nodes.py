"""Builds a graph of onnxruntime's operators, in which every value has a given name.

Every value has the name that it is given, so a graph can be read, and profiled, by its names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edge_demo.bundle.manifest import GraphSpec
from export.graph.nodes import graph_value
from export.graph.weights_file import WeightsFile

OPSETS = {"": 23, "com.microsoft": 1}
_IR_VERSION = 11


class NamedNodes:
    """A graph in the order its nodes are added.

    Args:
        weights: the file that weights stay in.
        contract: the graph's inputs and outputs.

    Attributes:
        contract: as it was given.
        inputs: the graph's inputs by name.
    """

    def __init__(self, weights: WeightsFile, contract: GraphSpec) -> None:
        self.contract = contract
        self.inputs = {spec.name: graph_value(spec) for spec in contract.inputs}
        self._weights = weights
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}

    def weight(self, name: str) -> ir.Value:
        """A tensor of the weights file."""
        if name not in self._initializers:
            self._initializers[name] = self._weights.initializer(name)
        return self._initializers[name]

    def value(self, name: str, make: Callable[[str], ir.Value]) -> ir.Value:
        """What `make(name)` adds to the graph; made once for each name."""
        if name not in self._shared:
            self._shared[name] = make(name)
        return self._shared[name]

    def name_rows(self, name: str, of: str, first: int, count: int) -> None:
        """Name some rows of a tensor of the weights file as a tensor of their own."""
        self._weights.add_rows(name, of, first, count)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant that stays in the graph; made once for each name."""
        if name not in self._initializers:
            tensor = ir.tensor(array, name=name)
            self._initializers[name] = ir.val(name, tensor.dtype, array.shape, const_value=tensor)
        return self._initializers[name]

    def op(
        self, op_type: str, inputs: Sequence[ir.Value], output: str, domain: str = "", **attributes
    ) -> ir.Value:
        """Add a node of one output; returns that."""
        return self.ops(op_type, inputs, [output], domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[str],
        domain: str = "",
        **attributes,
    ) -> Sequence[ir.Value]:
        """Add a node, called as its first output; returns its outputs."""
        node = ir.node(
            op_type,
            inputs,
            attributes,
            domain=domain,
            outputs=[ir.val(name) for name in outputs],
            name=outputs[0],
        )
        self._nodes.append(node)
        return node.outputs

    def branch(self, name: str, make: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        """What `make` adds as a graph within this one; it returns the outputs, which are float32.

        Its constants stay in the graph around it, so they are kept once.
        """
        around, self._nodes = self._nodes, []
        try:
            outputs = make()
            for value in outputs:
                value.dtype = ir.DataType.FLOAT
            return ir.Graph([], outputs, nodes=self._nodes, name=name)
        finally:
            self._nodes = around

    def float32(self, x: ir.Value, out: str) -> ir.Value:
        """A value as float32."""
        return self.op("Cast", [x], out, to=int(ir.DataType.FLOAT))

    def rename(self, x: ir.Value, name: str) -> ir.Value:
        """Give a node's output the name that the contract requires."""
        x.name = name
        return x

    def model(self, outputs: Sequence[ir.Value]) -> ir.Model:
        """The graph as a model; its outputs must be those of the contract, in order."""
        for value, spec in zip(outputs, self.contract.outputs, strict=True):
            if value.name != spec.name:
                raise AssertionError(
                    f"the graph's output is {value.name}, but the contract requires {spec.name}"
                )
            value.dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
            value.shape = ir.Shape(spec.shape)
        graph = ir.Graph(
            [self.inputs[spec.name] for spec in self.contract.inputs],
            outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=OPSETS,
            name="gemma",
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="gemma-keras")
