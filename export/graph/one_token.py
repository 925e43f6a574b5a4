"""The attention of a single token in standard operators, heads that share keys in one product.

`GroupQueryAttention` multiplies each head alone, and packs all keys again for each. On Armv8 that
takes 55 thousand instructions a position of context for Gemma 3 270M; the products here take 23
thousand (docs/benchmarks.md, `make count-arm64`). `GroupQueryAttention` stays for prompts, several
rows, and the token for which a windowed buffer is moved to its front: an `If` chooses.

Both write the same keys and values into the same buffers. Their sums differ in the last bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from export.graph.named_nodes import NamedNodes
from gemma_keras.config import LayerSpec

_MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the attention of a layer reads.

    Attributes:
        query: float32 `(batch, length, num_heads * head_dim)`, before rotary embedding.
        key: float32 `(batch, length, num_kv_heads * head_dim)`, before rotary embedding.
        value: of the same shape.
        past_key: the buffer, float32 `(batch, num_kv_heads, capacity, head_dim)`.
        past_value: the same of values.
        total: tokens after the call, an int32 scalar.
        table: cosines and sines, float32 `(rope_length, head_dim / 2)`.
        windowed: whether the buffers keep the last window only, by the rule of
            `sliding_window_cache`.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    total: ir.Value
    table: tuple[ir.Value, ir.Value]
    windowed: bool


def attention(
    graph: NamedNodes,
    layer: LayerSpec,
    given: Inputs,
    outputs: Sequence[str],
    otherwise: Callable[[Sequence[str]], Sequence[ir.Value]],
) -> Sequence[ir.Value]:
    """The attention of a layer: of a single token here, of all else by `otherwise`.

    Args:
        graph: to add to.
        layer: the layer.
        given: what it reads.
        outputs: names of the attended values, and of the buffers of keys and values.
        otherwise: adds the operator for all else, with outputs of the names that it is given.

    Returns:
        The three outputs.
    """
    step = _step(graph, layer, given)
    ours, theirs = ([f"{name}.{which}" for name in outputs] for which in ("one", "many"))
    one = graph.branch(ours[0], lambda: _one_token(graph, layer, given, step, ours))
    many = graph.branch(theirs[0], lambda: otherwise(theirs))
    return graph.ops("If", [step.alone], outputs, then_branch=one, else_branch=many)


@dataclasses.dataclass(frozen=True)
class _Step:
    """Where a single token is written and what it sees; the same for layers of one window.

    Attributes:
        position: of the token in the text, int64 `(1,)`.
        rows: indices of its rows in a buffer, int64 `(1, num_kv_heads, 1, 3)`.
        first: the first place that it sees, int64 `(1,)`.
        end: the place after its own, int64 `(1,)`.
        alone: whether the call has one token that is added after those in the buffers.
    """

    position: ir.Value
    rows: ir.Value
    first: ir.Value
    end: ir.Value
    alone: ir.Value


def _step(graph: NamedNodes, layer: LayerSpec, given: Inputs) -> _Step:
    def number(value: int) -> ir.Value:
        return graph.constant(f"number.{value}", np.array([value], np.int64))

    def once(name: str, op: str, *inputs: ir.Value, **attributes) -> ir.Value:
        whole = f"one_token.{name}"
        return graph.value(whole, lambda n: graph.op(op, inputs, n, **attributes))

    int64 = int(ir.DataType.INT64)
    tokens = once("tokens", "Reshape", once("total", "Cast", given.total, to=int64), number(1))
    position = once("position", "Sub", tokens, number(1))
    size = once("size", "Shape", graph.inputs["inputs_embeds"], end=2)
    count = once("count", "ReduceProd", size, keepdims=0)
    alone = once("alone", "Equal", count, graph.constant("one", np.array(1, np.int64)))
    window, end, kind = layer.sliding_window, tokens, "all"
    if given.windowed:
        assert window is not None
        kind = f"window.{window}"
        capacity = once(f"{kind}.capacity", "Shape", given.past_key, start=2, end=3)
        moved_by = once(f"{kind}.moved_by", "Sub", capacity, number(window - 1))

        def held(total: ir.Value, name: str) -> ir.Value:
            """How many of so many tokens a buffer holds: `edge_demo.engine.kv_cache._resident`."""
            name = f"{kind}.{name}"
            beyond = once(f"{name}.beyond", "Sub", total, capacity)
            beyond = once(f"{name}.at_least_0", "Max", beyond, number(0))
            less_one = once(f"{kind}.moved_by_less_1", "Sub", moved_by, number(1))
            rounded = once(f"{name}.rounded", "Add", beyond, less_one)
            moves = once(f"{name}.moves", "Div", rounded, moved_by)
            return once(f"{name}.held", "Sub", total, once(f"{name}.moved", "Mul", moves, moved_by))

        end = held(tokens, "after")
        follows = once(f"{kind}.next", "Add", held(position, "before"), number(1))
        appended = once(f"{kind}.appended", "Equal", follows, end)
        alone = once(f"{kind}.alone", "And", alone, appended)
    first = number(0)
    if window is not None:
        kind = f"{kind}.{window}"
        first = once(
            f"{kind}.first", "Max", once(f"{kind}.back", "Sub", end, number(window)), first
        )
    heads = layer.num_kv_heads
    place = once(f"{kind}.place", "Sub", end, number(1))
    place = once(f"{kind}.index", "Concat", number(0), number(0), place, axis=0)
    grid = np.zeros((1, heads, 1, 3), np.int64)
    grid[0, :, 0, 1] = range(heads)
    rows = once(f"{kind}.rows.{heads}", "Add", graph.constant(f"heads.{heads}", grid), place)
    return _Step(position, rows, first, end, alone)


def _one_token(
    graph: NamedNodes, layer: LayerSpec, given: Inputs, step: _Step, outputs: Sequence[str]
) -> list[ir.Value]:
    attended, present_key, present_value = outputs
    heads, shared_by = layer.num_kv_heads, layer.num_heads // layer.num_kv_heads

    def shaped(x: ir.Value, *shape: int, out: str) -> ir.Value:
        name = "shape." + ".".join(map(str, shape))
        return graph.op("Reshape", [x, graph.constant(name, np.array(shape, np.int64))], out)

    def rotated(x: ir.Value, count: int, out: str) -> ir.Value:
        inputs = [x, step.position, *given.table]
        return graph.op(
            "RotaryEmbedding", inputs, out, domain=_MICROSOFT, num_heads=count, interleaved=0
        )

    def written(buffer: ir.Value, row: ir.Value, out: str) -> tuple[ir.Value, ir.Value]:
        """The buffer with the token's row, and the rows that the token sees."""
        row = shaped(row, 1, heads, 1, layer.head_dim, out=f"{out}.row")
        present = graph.op("ScatterND", [buffer, step.rows, row], out)
        axis = graph.constant("axis_2", np.array([2], np.int64))
        return present, graph.op("Slice", [present, step.first, step.end, axis], f"{out}.seen")

    query = rotated(given.query, layer.num_heads, f"{attended}.query.rotated")
    query = shaped(query, 1, heads, shared_by, layer.head_dim, out=f"{attended}.query")
    key = rotated(given.key, heads, f"{attended}.key.rotated")
    keys, seen_keys = written(given.past_key, key, present_key)
    values, seen_values = written(given.past_value, given.value, present_value)
    cap = layer.attention_soft_cap
    scores = graph.op(
        "FusedMatMul",
        [query, seen_keys],
        f"{attended}.scores",
        domain=_MICROSOFT,
        transB=1,
        alpha=layer.query_scale / (cap or 1),
    )
    if cap is not None:
        bent = graph.op("Tanh", [scores], f"{attended}.tanh")
        factor = graph.constant(f"soft_cap.{cap}", np.array(cap, np.float32))
        scores = graph.op("Mul", [bent, factor], f"{attended}.capped")
    weights = graph.op("Softmax", [scores], f"{attended}.weights", axis=-1)
    summed = graph.op("MatMul", [weights, seen_values], f"{attended}.by_heads")
    return [shaped(summed, 1, 1, layer.num_heads * layer.head_dim, out=attended), keys, values]
