"""Products of 8-bit integers with one scale a row, for processors without 8-bit dot products.

A token's activations `x` become integers with one scale `s`, the largest magnitude / 127. One term
is `x = s q` with `q = round(x / s)`. Two terms are `x = s (q + r / 254)` with
`r = round(254 (x / s - q))`.

`QGemm` multiplies them by the rows' integers. The second term is more rows of the same product, so
the weights are read once. On Armv8.0 a weight takes 0.46 instructions with one term, and 0.69 with
two. A product with blocks of 8 bits takes 15 (docs/benchmarks.md).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.formats.formats import Format
from export.graph.named_nodes import NamedNodes

_MICROSOFT = "com.microsoft"
_HIGHEST = 127
_SMALLEST = 1e-30  # the scale of a token of zeros


def product(
    graph: NamedNodes, name: str, x: ir.Value, out: str, fmt: Format, shape: tuple[int, int]
) -> ir.Value:
    """The product of activations with a matrix that is stored by rows.

    Args:
        graph: to add to.
        name: of the matrix in the weights file.
        x: float32 `(batch, length, inputs)`.
        out: the name of the result.
        fmt: the matrix's.
        shape: its outputs and inputs.

    Returns:
        float32 `(batch, length, outputs)`.
    """
    num_rows, num_inputs = shape
    scale = graph.value(f"{x.name}.scale", lambda n: _scale(graph, x, num_inputs, n))
    integers = graph.value(
        f"{x.name}.int8.{fmt.terms}", lambda n: _integers(graph, x, scale, fmt, n)
    )
    no_scale = graph.constant("scale_1", np.array(1, np.float32))
    zero = graph.constant("int8_0", np.array(0, np.int8))
    zeros = graph.constant(f"int8_0.{num_rows}", np.zeros(num_rows, np.int8))
    weights = graph.weight(f"{name}.quantized"), graph.weight(f"{name}.scales"), zeros
    rows = graph.op(
        "QGemm", [integers, no_scale, zero, *weights], f"{out}.rows", domain=_MICROSOFT, transB=1
    )
    if fmt.terms == 2:
        rows = _sum_of_terms(graph, rows, f"{out}.sum")
    scaled = graph.op("Mul", [rows, scale], f"{out}.scaled")
    size = graph.constant(f"size.{num_rows}", np.array([num_rows], np.int64))
    lead = graph.value(f"{x.name}.lead", lambda n: graph.op("Shape", [x], n, end=2))
    whole = graph.value(
        f"{x.name}.shape.{num_rows}", lambda n: graph.op("Concat", [lead, size], n, axis=0)
    )
    return graph.op("Reshape", [scaled, whole], out)


def lookup(graph: NamedNodes, table: str, ids: ir.Value, out: str) -> ir.Value:
    """Rows of a table that is stored by rows, float32, one more axis than `ids` has."""
    integers = graph.op("Gather", [graph.weight(f"{table}.quantized"), ids], f"{out}.int8")
    scales = graph.op("Gather", [graph.weight(f"{table}.scales"), ids], f"{out}.scales")
    last = graph.constant("axis_-1", np.array([-1], np.int64))
    column = graph.op("Unsqueeze", [scales, last], f"{out}.scales.column")
    scaled = graph.op("Mul", [graph.float32(integers, f"{out}.float32"), column], f"{out}.by_row")
    return graph.op("Mul", [scaled, graph.weight(f"{table}.columns")], out)


def _scale(graph: NamedNodes, x: ir.Value, num_inputs: int, name: str) -> ir.Value:
    """A scale for each token: `(tokens, 1)`."""
    flat = _flat(graph, x, num_inputs)
    last = graph.constant("axis_-1", np.array([-1], np.int64))
    greatest = graph.op(
        "ReduceMax", [graph.op("Abs", [flat], f"{name}.abs"), last], f"{name}.max", keepdims=1
    )
    step = graph.constant("scale_1/127", np.array(1 / _HIGHEST, np.float32))
    smallest = graph.constant("scale_smallest", np.array(_SMALLEST, np.float32))
    return graph.op("Max", [graph.op("Mul", [greatest, step], f"{name}.step"), smallest], name)


def _flat(graph: NamedNodes, x: ir.Value, num_inputs: int) -> ir.Value:
    shape = graph.constant(f"shape.tokens.{num_inputs}", np.array([-1, num_inputs], np.int64))
    return graph.value(f"{x.name}.tokens", lambda n: graph.op("Reshape", [x, shape], n))


def _integers(graph: NamedNodes, x: ir.Value, scale: ir.Value, fmt: Format, name: str) -> ir.Value:
    """The terms, one after another: int8 `(terms * tokens, inputs)`."""
    flat = _flat(graph, x, fmt.block_size)
    steps = graph.value(f"{x.name}.steps", lambda n: graph.op("Div", [flat, scale], n))
    first = graph.value(f"{x.name}.steps.round", lambda n: graph.op("Round", [steps], n))
    int8 = int(ir.DataType.INT8)
    if fmt.terms == 1:
        return graph.op("Cast", [first], name, to=int8)
    finer = graph.constant("steps_254", np.array(2 * _HIGHEST, np.float32))
    rest = graph.op("Sub", [steps, first], f"{name}.rest")
    rest = graph.op("Mul", [rest, finer], f"{name}.rest.steps")
    rest = graph.op("Round", [rest], f"{name}.rest.round")
    both = graph.op("Concat", [first, rest], f"{name}.terms", axis=0)
    return graph.op("Cast", [both], name, to=int8)


def _sum_of_terms(graph: NamedNodes, rows: ir.Value, name: str) -> ir.Value:
    """`(2 * tokens, outputs)` to `(tokens, outputs)`."""
    first, rest = graph.ops(
        "Split", [rows], [f"{name}.first", f"{name}.rest"], axis=0, num_outputs=2
    )
    step = graph.constant("steps_1/254", np.array(1 / (2 * _HIGHEST), np.float32))
    return graph.op("Add", [first, graph.op("Mul", [rest, step], f"{name}.small")], name)
