"""The graph of a text embedder: a vector of length 1 for each text.

The blocks are those of `export.graph.fused`; attention, the mean over tokens and the projections
are here. Attention is bidirectional, which `GroupQueryAttention` is not, so it is made of standard
operators. A text's vector does not depend on where its padding is: rotary positions count only by
their differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edge_demo.bundle.manifest import GraphSpec
from export.formats.formats import Plan
from export.formats.projections import projection_specs
from export.graph.contract import rope_key, ropes
from export.graph.fused import FusedGraph
from export.graph.weights_file import WeightsFile
from gemma_keras.config import GemmaConfig, LayerSpec

_MICROSOFT = "com.microsoft"
_UNSEEN = -1e30  # added to scores; any finite score disappears in it
_SHORTEST = 1e-12  # length of a vector, which divides it

_Tables = dict[tuple[float, float, int], tuple[ir.Value, ir.Value]]


def build_embedder(
    config: GemmaConfig,
    projections: Sequence[tuple[int, ...]],
    plan: Plan,
    weights: WeightsFile,
    contract: GraphSpec,
    max_context: int,
) -> ir.Model:
    """An embedder as one graph that keeps `contract` and points into `weights`.

    Args:
        config: of the model below the pooling.
        projections: shapes of the matrices after it, `(in, out)` each.
        plan: the formats its weights were stored in.
        weights: where they are stored.
        contract: one of an embedder, of `export.graph.contract`.
        max_context: the longest text, in tokens.
    """
    return _EmbedderGraph(config, projections, plan, weights, contract, max_context).build()


class _EmbedderGraph(FusedGraph):
    def __init__(
        self,
        config: GemmaConfig,
        projections: Sequence[tuple[int, ...]],
        plan: Plan,
        weights: WeightsFile,
        contract: GraphSpec,
        max_context: int,
    ) -> None:
        super().__init__(config, plan, weights, contract, max_context, {}, False)
        self.projections = projection_specs(projections)
        self.specs = self.specs | self.projections

    def build(self) -> ir.Model:
        tables = {key: self._constant_rope_table(rope) for key, rope in ropes(self.config).items()}
        embedded = self._embedded(self.inputs.get("input_ids"))
        hidden = self._blocks(
            embedded, lambda i, layer, x: self._attention_both_ways(i, layer, x, tables)
        )
        x = self._mean(hidden)
        for name in self.projections:
            x = self._matmul(name, x)
        return self.model([self._unit(x, "sentence_embedding")])

    def _attention_both_ways(
        self, i: int, layer: LayerSpec, x: ir.Value, tables: _Tables
    ) -> ir.Value:
        """`(batch, length, hidden_dim)` in and out."""
        name = f"layers.{i}.attention"
        query, key, value = self._query_key_value(name, layer, x)
        heads, kv_heads = layer.num_heads, layer.num_kv_heads
        query = self._rotated(f"{name}.query", query, heads, tables[rope_key(layer)])
        key = self._rotated(f"{name}.key", key, kv_heads, tables[rope_key(layer)])
        # (batch, kv_heads, heads that share a key, length, head_dim)
        query = self._by_heads(f"{name}.query", query, layer, heads // kv_heads)
        key = self._by_heads(f"{name}.key", key, layer, 1)
        value = self._by_heads(f"{name}.value", value, layer, 1)
        cap = layer.attention_soft_cap
        scores = self.op(
            "FusedMatMul",
            [query, key],
            f"{name}.scores",
            domain=_MICROSOFT,
            transB=1,
            alpha=layer.query_scale / (cap or 1),
        )
        if cap is not None:
            bent = self.op("Tanh", [scores], f"{name}.tanh")
            factor = self.constant(f"soft_cap.{cap}", np.array(cap, np.float32))
            scores = self.op("Mul", [bent, factor], f"{name}.capped")
        seen = self.op("Add", [scores, self._unseen(layer.sliding_window)], f"{name}.masked")
        weights = self.op("Softmax", [seen], f"{name}.weights", axis=-1)
        attended = self.op("MatMul", [weights, value], f"{name}.by_heads")
        attended = self.op("Transpose", [attended], f"{name}.by_tokens", perm=[0, 3, 1, 2, 4])
        merged = self.constant("shape.merged", np.array([0, 0, -1], np.int64))
        attended = self.op("Reshape", [attended, merged], f"{name}.attended")
        return self._matmul(f"{name}.output", attended)

    def _rotated(
        self, name: str, x: ir.Value, heads: int, table: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        first = self.constant("position_0", np.array([0], np.int64))
        inputs = [x, first, *table]
        return self.op(
            "RotaryEmbedding",
            inputs,
            f"{name}.rotated",
            domain=_MICROSOFT,
            num_heads=heads,
            interleaved=0,
        )

    def _by_heads(self, name: str, x: ir.Value, layer: LayerSpec, group: int) -> ir.Value:
        shape = [0, 0, layer.num_kv_heads, group, layer.head_dim]
        label = "shape." + ".".join(map(str, shape))
        split = self.op(
            "Reshape", [x, self.constant(label, np.array(shape, np.int64))], f"{name}.split"
        )
        return self.op("Transpose", [split], f"{name}.by_heads", perm=[0, 2, 3, 1, 4])

    def _unseen(self, window: int | None) -> ir.Value:
        """What is added to scores: 0 for a key that a query sees, `(batch, 1, 1, length,
        length)`."""
        return self.value(f"unseen.{window}", lambda name: self._make_unseen(name, window))

    def _make_unseen(self, name: str, window: int | None) -> ir.Value:
        seen = self.value("real", self._make_real)
        if window is not None:
            distance = self.value("distance", self._make_distance)
            limit = self.constant(f"window.{window}", np.array(window, np.int32))
            near = self.op("Less", [distance, limit], f"{name}.near")
            seen = self.op("And", [seen, near], f"{name}.seen")
        zero = self.constant("zero", np.array(0, np.float32))
        unseen = self.constant("unseen", np.array(_UNSEEN, np.float32))
        return self.op("Where", [seen, zero, unseen], name)

    def _make_real(self, name: str) -> ir.Value:
        """Whether a key is a token and not padding, `(batch, 1, 1, 1, length)`."""
        real = self.op(
            "Cast", [self.inputs["attention_mask"]], f"{name}.rows", to=int(ir.DataType.BOOL)
        )
        axes = self.constant("axes_1_2_3", np.array([1, 2, 3], np.int64))
        return self.op("Unsqueeze", [real, axes], name)

    def _make_distance(self, name: str) -> ir.Value:
        """Between a query and a key, in tokens: int32 `(length, length)`."""
        shape = self.op("Shape", [self.inputs["attention_mask"]], f"{name}.shape")
        one = self.constant("index_1", np.array(1, np.int64))
        length = self.op("Gather", [shape, one], f"{name}.length", axis=0)
        bounds = [self.constant("range.start", np.array(0, np.int64)), length, one]
        places = self.op("Range", bounds, f"{name}.range")
        places = self.op("Cast", [places], f"{name}.places", to=int(ir.DataType.INT32))
        axis = self.constant("axis_1", np.array([1], np.int64))
        column = self.op("Unsqueeze", [places, axis], f"{name}.column")
        return self.op("Abs", [self.op("Sub", [column, places], f"{name}.signed")], name)

    def _mean(self, hidden: ir.Value) -> ir.Value:
        """The mean over a text's tokens: `(batch, length, hidden_dim)` to `(batch, 1,
        hidden_dim)`."""
        mask = self.float32(self.inputs["attention_mask"], "mask")
        last = self.constant("axis_-1", np.array([-1], np.int64))
        column = self.op("Unsqueeze", [mask, last], "mask.column")
        axis = self.constant("axis_1", np.array([1], np.int64))
        real = self.op("Mul", [hidden, column], "hidden.real")
        total = self.op("ReduceSum", [real, axis], "hidden.sum", keepdims=1)
        count = self.op("ReduceSum", [column, axis], "mask.count", keepdims=1)
        one = self.constant("float_1", np.array(1, np.float32))
        return self.op("Div", [total, self.op("Max", [count, one], "mask.tokens")], "hidden.mean")

    def _unit(self, x: ir.Value, out: str) -> ir.Value:
        """Vectors of length 1: `(batch, 1, dimensions)` to `(batch, dimensions)`."""
        last = self.constant("axis_-1", np.array([-1], np.int64))
        length = self.op("ReduceL2", [x, last], f"{out}.length", keepdims=1)
        shortest = self.constant("shortest", np.array(_SHORTEST, np.float32))
        divisor = self.op("Max", [length, shortest], f"{out}.divisor")
        unit = self.op("Div", [x, divisor], f"{out}.unit")
        flat = self.constant("shape.flat", np.array([0, -1], np.int64))
        return self.op("Reshape", [unit, flat], out)
