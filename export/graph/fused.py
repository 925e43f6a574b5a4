"""The fused lowering: builds a graph of onnxruntime's operators from a configuration and stored
weights.

It reads top to bottom as the model does (`gemma_keras.model.layers`), and is independent of Keras.
Operators of the domain `com.microsoft` are documented in onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edge_demo.bundle.manifest import GraphSpec, RopeSpec
from export.formats.formats import Format, Plan, rows_and_inputs
from export.formats.fused_matrices import fused_matrices, joined_name
from export.graph import by_rows, one_token
from export.graph.contract import (
    CANDIDATES_FILE,
    INTERCHANGE_FILE,
    num_candidates,
    rope_key,
    ropes,
)
from export.graph.named_nodes import NamedNodes
from export.graph.padding import Unpadded, moved_back, without_padding
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import head_table, weight_specs
from gemma_keras.config import GemmaConfig, LayerSpec

_MICROSOFT = "com.microsoft"
_INT8_ACTIVATIONS = 4
_LOW_PLANE_STEPS = 16  # of the low plane in one of the high
_PER_CHANNEL = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
_GROUP = 64  # size of a group of logits; the search for candidates compares group maxima
_MOST_PACKED = 24 << 20  # bytes of the head that the candidates graph has packed at once


def build_graph(
    config: GemmaConfig,
    plan: Plan,
    weights: WeightsFile,
    contract: GraphSpec,
    max_context: int,
    kv_scales: Mapping[str, np.ndarray] | None = None,
    one_token_attention: bool = False,
) -> ir.Model:
    """The model as one graph that keeps `contract` and points into `weights`.

    Args:
        config: the model's.
        plan: the formats its weights were stored in.
        weights: where they are stored.
        contract: one of `export.graph.contract`.
        max_context: length of the rotary tables that the interchange graph holds, in tokens.
        kv_scales: as `export.calibrate.kv_scales` measures them, for layers whose keys and values
        the
            contract wants as 8-bit integers.
        one_token_attention: whether the engine's graphs have an attention of their own for a single
            token; see `export.graph.one_token`.

    Raises:
        ConfigError: the model is bidirectional, which `GroupQueryAttention` is not.
    """
    config.require_causal("a graph with a key-value cache")
    return FusedGraph(
        config, plan, weights, contract, max_context, kv_scales or {}, one_token_attention
    ).build()


class FusedGraph(NamedNodes):
    """The graph being built; arguments as `build_graph`."""

    def __init__(
        self,
        config: GemmaConfig,
        plan: Plan,
        weights: WeightsFile,
        contract: GraphSpec,
        max_context: int,
        kv_scales: Mapping[str, np.ndarray],
        one_token_attention: bool,
    ) -> None:
        super().__init__(weights, contract)
        self.config = config
        self.plan = plan
        self.max_context = max_context
        self.kv_scales = kv_scales
        self.specs = weight_specs(config)
        self.head = head_table(config)
        self.fused_matrices = fused_matrices(config, plan)
        self.for_engine = contract.file != INTERCHANGE_FILE
        self.contracted = {spec.name: spec for spec in contract.inputs}
        self.one_token = one_token_attention and self.for_engine

    # --- the model, in order ---

    def build(self) -> ir.Model:
        tokens = None if self.for_engine else self._without_padding()
        seqlens, total = self._lengths(tokens)
        tables = self._rope_tables()
        presents: list[ir.Value] = []

        def attention(i: int, layer: LayerSpec, x: ir.Value) -> ir.Value:
            table = tables[rope_key(layer)]
            attended, present = self._attention(i, layer, x, table, seqlens, total)
            presents.extend(present)
            return attended

        embedded = self._embedded(None if tokens is None else tokens.ids)
        hidden = self._pick(self._blocks(embedded, attention), tokens)
        if self.contract.file == CANDIDATES_FILE:
            return self.model([*self._candidates(hidden), *presents])
        return self.model([self._cap(self._logits(hidden), "logits"), *presents])

    def _blocks(
        self, residual: ir.Value, attention: Callable[[int, LayerSpec, ir.Value], ir.Value]
    ) -> ir.Value:
        """All blocks and the final norm, `(batch, length, hidden_dim)` in and out."""
        config = self.config
        normed = self._norm("layers.0.pre_attention_norm", residual)
        for i, layer in enumerate(config.layers):
            name = f"layers.{i}"
            attended = attention(i, layer, normed)
            if layer.post_norms:
                attended = self._norm(f"{name}.post_attention_norm", attended)
            normed, residual = self._add_and_norm(f"{name}.pre_ffw_norm", attended, residual)
            fed = self._mlp(i, normed)
            if layer.post_norms:
                fed = self._norm(f"{name}.post_ffw_norm", fed)
            last = i + 1 == len(config.layers)
            next_norm = "final_norm" if last else f"layers.{i + 1}.pre_attention_norm"
            normed, residual = self._add_and_norm(next_norm, fed, residual)
        return normed

    def _without_padding(self) -> Unpadded:
        return without_padding(
            self.op, self.constant, self.inputs["input_ids"], self.inputs["attention_mask"]
        )

    def _lengths(self, tokens: Unpadded | None) -> tuple[ir.Value, ir.Value]:
        """`seqlens_k` and `total_sequence_length` as `GroupQueryAttention` takes them.

        For this operator every token of a call is real: padding comes last, where no real token
        attends.
        """
        if tokens is None:
            return self.inputs["seqlens_k"], self.inputs["total_sequence_length"]
        one = self.constant("one", np.array(1, np.int64))
        last = self.op("Sub", [tokens.length, one], "padding.length_less_1")
        seqlens = self.op("Add", [tokens.past, last], "padding.last")
        shape = self.op("Shape", [self.inputs["attention_mask"]], "attention_mask.shape")
        index = self.constant("index_1", np.array(1, np.int64))
        total = self.op("Gather", [shape, index], "attention_mask.total", axis=0)
        int32 = int(ir.DataType.INT32)
        return (
            self.op("Cast", [seqlens], "seqlens_k", to=int32),
            self.op("Cast", [total], "total_sequence_length", to=int32),
        )

    def _rope_tables(self) -> dict[tuple[float, float, int], tuple[ir.Value, ir.Value]]:
        return {
            key: (self.inputs[f"{rope.name}.cos"], self.inputs[f"{rope.name}.sin"])
            if self.for_engine
            else self._constant_rope_table(rope)
            for key, rope in ropes(self.config).items()
        }

    def _constant_rope_table(self, rope: RopeSpec) -> tuple[ir.Value, ir.Value]:
        """Made from constants, so a runtime computes it once, when it loads the graph."""
        bounds = [
            self.constant(f"{rope.name}.{part}", np.array(value, np.float32))
            for part, value in (("start", 0), ("limit", self.max_context), ("step", 1))
        ]
        positions = self.op("Range", bounds, f"{rope.name}.positions")
        axis = self.constant("axis_1", np.array([1], np.int64))
        column = self.op("Unsqueeze", [positions, axis], f"{rope.name}.column")
        frequencies = rope.theta ** (-np.arange(rope.dims, dtype=np.float32) / rope.dims)
        row = self.constant(
            f"{rope.name}.frequencies", (frequencies / rope.scale)[None].astype(np.float32)
        )
        angles = self.op("Mul", [column, row], f"{rope.name}.angles")
        # By way of float64, so that they are the device's tables to the last bit: one bit is
        # enough to round an activation the other way, and then other tokens come out.
        exact = self.op("Cast", [angles], f"{rope.name}.exact", to=int(ir.DataType.DOUBLE))
        cosines = self.op("Cos", [exact], f"{rope.name}.cos.exact")
        sines = self.op("Sin", [exact], f"{rope.name}.sin.exact")
        return (
            self.float32(cosines, f"{rope.name}.cos"),
            self.float32(sines, f"{rope.name}.sin"),
        )

    def _embedded(self, ids: ir.Value | None) -> ir.Value:
        """Scaled embeddings of ids, `(batch, length, hidden_dim)`; without ids, the device's."""
        if ids is None:
            return self.inputs["inputs_embeds"]
        rows = self._rows("token_embedding", ids, "embedded")
        scale = self.constant("embedding_scale", np.array(self.config.embedding_scale, np.float32))
        return self.op("Mul", [rows, scale], "embedded.scaled")

    def _attention(
        self,
        i: int,
        layer: LayerSpec,
        x: ir.Value,
        table: tuple[ir.Value, ir.Value],
        seqlens: ir.Value,
        total: ir.Value,
    ) -> tuple[ir.Value, list[ir.Value]]:
        name = f"layers.{i}.attention"
        query, key, value = self._query_key_value(name, layer, x)
        past = [self.inputs[f"past_key_values.{i}.{part}"] for part in ("key", "value")]
        outputs = [f"{name}.attended", f"present.{i}.key", f"present.{i}.value"]
        attributes: dict[str, int | float | str] = {
            "num_heads": layer.num_heads,
            "kv_num_heads": layer.num_kv_heads,
            "scale": layer.query_scale,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        if layer.sliding_window is not None:
            attributes["local_window_size"] = layer.sliding_window
        if self._keeps_a_window(i):
            attributes["sliding_window_cache"] = 1
        if layer.attention_soft_cap is not None:
            attributes["softcap"] = layer.attention_soft_cap
        scales = []
        if self.contracted[f"past_key_values.{i}.key"].dtype == "int8":
            attributes |= {"kv_cache_bit_width": 8} | _PER_CHANNEL
            names = [f"present.{i}.{part}" for part in ("key", "value")]
            # its position_ids, attention_bias and head_sink come first, which nothing is given for
            scales = [None] * 3 + [self.constant(f"{n}.scale", self.kv_scales[n]) for n in names]

        def operator(outputs: Sequence[str]) -> Sequence[ir.Value]:
            return self.ops(
                "GroupQueryAttention",
                [query, key, value, *past, seqlens, total, *table, *scales],
                outputs,
                domain=_MICROSOFT,
                **attributes,
            )

        if self.one_token and not scales:
            past_key, past_value = past
            given = one_token.Inputs(
                query,
                key,
                value,
                past_key,
                past_value,
                total,
                table,
                windowed=self._keeps_a_window(i),
            )
            attended, *present = one_token.attention(self, layer, given, outputs, operator)
        else:
            attended, *present = operator(outputs)
        return self._matmul(f"{name}.output", attended), present

    def _query_key_value(self, name: str, layer: LayerSpec, x: ir.Value) -> Sequence[ir.Value]:
        matrices = [f"{name}.{n}" for n in ("query", "key", "value")]
        if not layer.qk_norm:
            return self._matmuls(matrices, x)
        query_norm, key_norm = (self.weight(f"{name}.{n}_norm") for n in ("query", "key"))
        if self.fused_matrices.get(matrices[0]) != tuple(matrices):
            query, key, value = self._matmuls(matrices, x)
            query = self._head_norm(f"{name}.query_norm", query, query_norm, layer.head_dim)
            return query, self._head_norm(f"{name}.key_norm", key, key_norm, layer.head_dim), value
        # One norm over the heads of both; the factors are repeated once, when a runtime loads them.
        query_size, key_size, value_size = self._num_outputs(matrices)
        whole = self._joined_matmul(matrices, x)
        both, value = self._split(whole, (query_size + key_size, value_size))
        factors = self.op(
            "Concat",
            [
                self._repeated(query_norm, layer.num_heads, layer.head_dim),
                self._repeated(key_norm, layer.num_kv_heads, layer.head_dim),
            ],
            f"{name}.query+key_norm",
            axis=0,
        )
        normed = self._head_norm(f"{name}.query+key_norm", both, factors, layer.head_dim)
        return *self._split(normed, (query_size, key_size)), value

    def _repeated(self, norm: ir.Value, heads: int, head_dim: int) -> ir.Value:
        shape = self.constant(f"shape.{heads}.{head_dim}", np.array([heads, head_dim], np.int64))
        return self.op("Expand", [norm, shape], f"{norm.name}.repeated")

    def _keeps_a_window(self, i: int) -> bool:
        """Whether the contract stores only the last window of keys and values of a layer."""
        capacity = self.contracted[f"past_key_values.{i}.key"].shape[2]
        return self.for_engine and capacity != "capacity"

    def _mlp(self, i: int, x: ir.Value) -> ir.Value:
        name = f"layers.{i}.mlp"
        gate, up = self._matmuls([f"{name}.gate", f"{name}.up"], x)
        gelu = self.op("Gelu", [gate], f"{name}.gelu", approximate="tanh")
        gated = self.op("Mul", [gelu, up], f"{name}.gated")
        return self._matmul(f"{name}.down", gated)

    def _pick(self, hidden: ir.Value, tokens: Unpadded | None) -> ir.Value:
        if tokens is not None:
            return moved_back(self.op, self.constant, hidden, tokens)
        positions = self.inputs["logit_positions"]
        return self.op("Gather", [hidden, positions], "hidden.picked", axis=1)

    def _logits(self, hidden: ir.Value) -> ir.Value:
        """All the logits, before the final soft cap."""
        fmt = self.plan[self.head]
        if fmt.planes == 2:
            high = self._proposals(hidden)
            low = self._head_product(hidden, "logits.low", fmt.low_plane, "low")
            return self.op("Add", [high, low], "logits.uncapped")
        return self._head_product(hidden, "logits.uncapped", fmt)

    def _proposals(self, hidden: ir.Value) -> ir.Value:
        """Returns the logits from only the high plane of the head."""
        steps = self.constant("low_plane_steps", np.array(_LOW_PLANE_STEPS, np.float32))
        scaled = self.op("Mul", [hidden, steps], "hidden.scaled")
        fmt = self.plan[self.head].high_plane
        return self._head_product(scaled, "logits.high", fmt, "high")

    def _head_product(
        self, x: ir.Value, out: str, fmt: Format, part: str = "quantized"
    ) -> ir.Value:
        """The product with the head's table, or with a plane of it.

        While onnxruntime packs a matrix, it is in memory twice. So the candidates graph splits a
        large table into several, by rows. The engine's graph does not, because then the logits of
        many positions would be in memory twice.
        """
        rows, width = rows_and_inputs(self.specs[self.head])
        count = 1
        if self.contract.file == CANDIDATES_FILE:
            count = -(-fmt.num_bytes(rows, width) // _MOST_PACKED)
        step = -(-rows // (count * _GROUP)) * _GROUP
        if step >= rows:
            return self._head_rows_product(self.head, rows, x, out, fmt, part)
        products = []
        for first in range(0, rows, step):
            label, own = f"{self.head}.from.{first}", min(step, rows - first)
            for suffix in (f".{part}", ".scales", ".zero_points") if fmt.quantized else ("",):
                if suffix != ".zero_points" or not fmt.symmetric:
                    self.name_rows(f"{label}{suffix}", f"{self.head}{suffix}", first, own)
            products.append(self._head_rows_product(label, own, x, f"{out}.{first}", fmt, part))
        return self.op("Concat", products, out, axis=-1)

    def _head_rows_product(
        self, table: str, rows: int, x: ir.Value, out: str, fmt: Format, part: str
    ) -> ir.Value:
        if fmt.by_rows:
            return by_rows.product(self, table, x, out, fmt, (rows, self.config.hidden_dim))
        if fmt.quantized:
            shape = rows, self.config.hidden_dim
            return self._matmul_nbits(table, x, out, fmt, part, shape=shape)
        weight = self._as_float32(table, fmt)
        return self.op("FusedMatMul", [x, weight], out, domain=_MICROSOFT, transB=1)

    def _candidates(self, hidden: ir.Value) -> Sequence[ir.Value]:
        """Ids and logits of the most likely tokens.

        With a head in two planes, the high plane proposes them, and the low plane is added only for
        them. The product of `hidden` with a few hundred rows takes almost no time. If the contract
        leaves this to the device, the graph ends before it.
        """
        if self.plan[self.head].planes == 1:
            values, ids = self._greatest(self._logits(hidden))
            return self.rename(ids, "candidate_ids"), self._cap(values, "candidate_logits")
        high, ids = self._greatest(self._proposals(hidden))
        ids = self.rename(ids, "candidate_ids")
        if any(spec.name == "candidate_hidden" for spec in self.contract.outputs):
            state = self.op("Identity", [hidden], "candidate_hidden")
            return ids, self.rename(high, "candidate_high"), state
        plane = self.plan[self.head].low_plane
        # rows of the low plane: (batch, num_logits, k, hidden_dim)
        rows = self._gather_quantized(self.head, ids, "candidate_rows", plane, "low.rows")
        last = self.constant("axis_-1", np.array([-1], np.int64))
        column = self.op("Unsqueeze", [hidden, last], "hidden.column")
        product = self.op("MatMul", [rows, column], "candidate_logits.column")
        low = self.op("Squeeze", [product, last], "candidate_logits.low")
        logits = self.op("Add", [high, low], "candidate_logits.uncapped")
        return ids, self._cap(logits, "candidate_logits")

    def _greatest(self, logits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Returns the largest logits and their ids, `(batch, num_logits, k)` each, unordered.

        The k largest logits are in the k groups with the largest maxima. So most of the vocabulary
        is read only once, for the maxima. This takes an eighth of the time of `TopK` over all
        logits.
        """
        size, k = self.config.vocabulary_size, num_candidates(self.config)
        count = self.constant("num_candidates", np.array([k], np.int64))
        if size % _GROUP or size // _GROUP <= k:
            values, ids = self.ops(
                "TopK", [logits, count], ["logits.top", "logits.top.ids"], axis=-1, sorted=0
            )
            return values, ids
        split = self.constant("shape.groups", np.array([0, 0, -1, _GROUP], np.int64))
        groups = self.op("Reshape", [logits, split], "logits.groups")
        last = self.constant("axis_-1", np.array([-1], np.int64))
        maxima = self.op("ReduceMax", [groups, last], "logits.maxima", keepdims=0)
        _, chosen = self.ops(
            "TopK", [maxima, count], ["logits.maxima.top", "logits.chosen"], axis=-1, sorted=0
        )
        # ids of all the members of the chosen groups: (batch, num_logits, k * group)
        size_of_group = self.constant("group", np.array(_GROUP, np.int64))
        first = self.op("Mul", [chosen, size_of_group], "logits.chosen.first")
        first = self.op("Unsqueeze", [first, last], "logits.chosen.column")
        within = self.constant("within_group", np.arange(_GROUP, dtype=np.int64))
        members = self.op("Add", [first, within], "logits.members.groups")
        merged = self.constant("shape.merged", np.array([0, 0, -1], np.int64))
        members = self.op("Reshape", [members, merged], "logits.members")
        found = self.op("GatherElements", [logits, members], "logits.members.values", axis=-1)
        values, places = self.ops(
            "TopK", [found, count], ["logits.top", "logits.places"], axis=-1, sorted=0
        )
        ids = self.op("GatherElements", [members, places], "logits.top.ids", axis=-1)
        return values, ids

    def _cap(self, logits: ir.Value, out: str) -> ir.Value:
        cap = self.config.final_soft_cap
        if cap is None:
            return self.rename(logits, out)
        factor = self.constant("final_soft_cap", np.array(cap, np.float32))
        scaled = self.op("Div", [logits, factor], "logits.scaled")
        return self.op("Mul", [self.op("Tanh", [scaled], "logits.tanh"), factor], out)

    # --- parts ---

    def _matmul(self, name: str, x: ir.Value) -> ir.Value:
        fmt = self.plan[name]
        if fmt.quantized:
            return self._quantized_product(name, x, fmt, rows_and_inputs(self.specs[name]))
        return self.op("MatMul", [x, self._as_float32(name, fmt)], f"{name}.out")

    def _matmuls(self, names: Sequence[str], x: ir.Value) -> list[ir.Value]:
        """Products of one input with several matrices; those stored together are one product."""
        products: list[ir.Value] = []
        while len(products) < len(names):
            first = names[len(products)]
            run = self.fused_matrices.get(first)
            if run is None:
                products.append(self._matmul(first, x))
                continue
            products += self._split(self._joined_matmul(run, x), self._num_outputs(run))
        return products

    def _joined_matmul(self, names: Sequence[str], x: ir.Value) -> ir.Value:
        """The products with matrices that are stored together, one after another."""
        label = joined_name(names)
        shape = sum(self._num_outputs(names)), rows_and_inputs(self.specs[names[0]])[1]
        return self._quantized_product(label, x, self.plan[names[0]], shape)

    def _quantized_product(
        self, name: str, x: ir.Value, fmt: Format, shape: tuple[int, int]
    ) -> ir.Value:
        if fmt.by_rows:
            return by_rows.product(self, name, x, f"{name}.out", fmt, shape)
        return self._matmul_nbits(name, x, f"{name}.out", fmt, shape=shape)

    def _num_outputs(self, names: Sequence[str]) -> list[int]:
        return [rows_and_inputs(self.specs[name])[0] for name in names]

    def _split(self, x: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
        """Parts of the last axis."""
        constant = self.constant(
            f"split.{'.'.join(str(size) for size in sizes)}", np.array(sizes, np.int64)
        )
        outputs = [f"{x.name}.{number}" for number in range(len(sizes))]
        return self.ops("Split", [x, constant], outputs, axis=-1)

    def _matmul_nbits(
        self,
        name: str,
        x: ir.Value,
        out: str,
        fmt: Format,
        part: str = "quantized",
        *,
        shape: tuple[int, int],
    ) -> ir.Value:
        num_rows, num_inputs = shape
        inputs = [self.weight(f"{name}.{part}"), self.weight(f"{name}.scales")]
        if not fmt.symmetric:
            inputs.append(self.weight(f"{name}.zero_points"))
        return self.op(
            "MatMulNBits",
            [x, *inputs],
            out,
            domain=_MICROSOFT,
            N=num_rows,
            K=num_inputs,
            bits=fmt.bits,
            block_size=fmt.block_size,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _rows(self, table: str, ids: ir.Value, out: str) -> ir.Value:
        """Rows of a table as float32, one more axis than `ids` has."""
        fmt = self.plan[table]
        if not fmt.quantized:
            rows = self.op("Gather", [self.weight(table), ids], f"{out}.stored")
            return rows if fmt.bits == 32 else self.float32(rows, out)
        if fmt.by_rows:
            return by_rows.lookup(self, table, ids, out)
        if fmt.planes == 1:
            return self._gather_quantized(table, ids, out, fmt, "rows")
        high = self._gather_quantized(table, ids, f"{out}.high", fmt.high_plane, "high.rows")
        low = self._gather_quantized(table, ids, f"{out}.low", fmt.low_plane, "low.rows")
        steps = self.constant("low_plane_steps", np.array(_LOW_PLANE_STEPS, np.float32))
        return self.op("Add", [self.op("Mul", [high, steps], f"{out}.high16"), low], out)

    def _gather_quantized(
        self, table: str, ids: ir.Value, out: str, fmt: Format, part: str
    ) -> ir.Value:
        inputs = [self.weight(f"{table}.{part}"), ids, self.weight(f"{table}.scales")]
        if not fmt.symmetric:
            inputs.append(self.weight(f"{table}.zero_points"))
        return self.op(
            "GatherBlockQuantized",
            inputs,
            out,
            domain=_MICROSOFT,
            bits=fmt.bits,
            block_size=fmt.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _norm(self, name: str, x: ir.Value, factors: ir.Value | None = None) -> ir.Value:
        return self.op(
            "RMSNormalization",
            [x, self.weight(name) if factors is None else factors],
            f"{name}.out",
            axis=-1,
            epsilon=self.config.norm_epsilon,
        )

    def _head_norm(self, name: str, x: ir.Value, factors: ir.Value, head_dim: int) -> ir.Value:
        """The norm of each head by itself: `(batch, length, heads * head_dim)` in and out.

        The factors are for one head, or for each head.
        """
        split = self.constant(f"shape.heads.{head_dim}", np.array([0, 0, -1, head_dim], np.int64))
        merge = self.constant("shape.merged", np.array([0, 0, -1], np.int64))
        heads = self.op("Reshape", [x, split], f"{name}.heads")
        return self.op("Reshape", [self._norm(name, heads, factors), merge], f"{name}.merged")

    def _add_and_norm(
        self, name: str, x: ir.Value, residual: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """The norm of `x + residual`, and the sum itself."""
        normed, _, _, total = self.ops(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self.weight(name)],
            [f"{name}.out", "", "", f"{name}.residual"],
            domain=_MICROSOFT,
            epsilon=self.config.norm_epsilon,
        )
        return normed, total

    def _as_float32(self, name: str, fmt: Format) -> ir.Value:
        weight = self.weight(name)
        return weight if fmt.bits == 32 else self.float32(weight, f"{name}.float32")
