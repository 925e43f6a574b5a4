"""Reads quantized weights in a graph with standard operators (`DequantizeLinear`).

A matrix is transposed while it is packed, and dequantized along its first axis. In this form
onnxruntime recognizes a quantized matrix product. It transposes the constant when it loads the
graph, and then runs on the packed weights. Other runtimes compute the operators as written.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.errors import ExportRequestError
from export.formats.formats import Format, rows_and_inputs
from export.graph.nodes import Nodes
from gemma_keras.checkpoints.names import WeightSpec

_LAST = np.array([-1], np.int64)


def check_format(name: str, fmt: Format) -> None:
    """Raise an error for a format that standard operators do not support.

    Raises:
        ExportRequestError: it is not a float and not an integer of 4 or 8 bits, or it is in two
            planes.
    """
    if fmt.planes != 1:
        raise ExportRequestError(
            f"the traced lowering does not support {name} in {fmt.planes} planes; use 1 "
            "plane, which stores the same values"
        )
    if fmt.by_rows:
        raise ExportRequestError(
            f"the traced lowering does not support {name} by rows; use --lowering fused"
        )
    if fmt.bits not in (4, 8, 16, 32):
        raise ExportRequestError(
            f"the traced lowering does not support {name} in {fmt.bits} bits, only 4, 8, 16 "
            "and 32; use --lowering fused"
        )


def float32(nodes: Nodes, value: ir.Value, scope: str) -> ir.Value:
    """A stored float as float32."""
    if value.dtype == ir.DataType.FLOAT:
        return value
    return nodes.op(scope, "Cast", [value], to=int(ir.DataType.FLOAT))


def dequantized_matrix(nodes: Nodes, spec: WeightSpec, fmt: Format) -> ir.Value:
    """A quantized matrix or table as the right side of a product.

    Args:
        nodes: to add to.
        spec: of a weight that is stored as `NAME.quantized` uint8 `[rows, blocks, bytes of a
            block]`, `NAME.scales` float32 `[rows, blocks]` and, unless it is symmetric,
            `NAME.zero_points` uint8 `[rows, bytes of a row]`; integers of 4 bits have the low half
            of a byte first.
        fmt: its format.

    Returns:
        float32 `[inputs, rows]`.
    """
    name = spec.name
    num_rows, num_inputs = rows_and_inputs(spec)
    num_blocks = -(-num_inputs // fmt.block_size)
    padded = num_blocks * fmt.block_size

    def transposed(value: ir.Value) -> ir.Value:
        return nodes.op(name, "Transpose", [value], perm=[1, 0])

    dtype = ir.DataType.UINT4 if fmt.bits == 4 else ir.DataType.UINT8
    packed = nodes.stored(f"{name}.quantized", dtype, (num_rows, padded))
    scales = nodes.stored(f"{name}.scales")
    if f"{name}.zero_points" in nodes.weights.tensors:
        zero_points = transposed(_stored_zero_points(nodes, name, fmt, num_rows, num_blocks))
    else:
        shape = nodes.constant(np.array([num_blocks, num_rows], np.int64))
        zero_points = nodes.op(name, "Expand", [_middle(nodes, fmt), shape])
        if fmt.bits == 4:
            zero_points = nodes.op(name, "Cast", [zero_points], to=int(dtype))
    matrix = nodes.op(
        name,
        "DequantizeLinear",
        [transposed(packed), transposed(scales), zero_points],
        axis=0,
        block_size=fmt.block_size,
    )
    return matrix if padded == num_inputs else _first(nodes, name, matrix, num_inputs, axis=0)


def dequantized_rows(nodes: Nodes, spec: WeightSpec, fmt: Format, ids: ir.Value) -> ir.Value:
    """Some rows of a quantized table; only those are dequantized.

    Args:
        nodes: to add to.
        spec: of a table that is stored as `dequantized_matrix` says.
        fmt: its format.
        ids: int64 `(batch, length)`.

    Returns:
        float32 `(batch, length, inputs)`.
    """
    name = spec.name
    num_rows, num_inputs = rows_and_inputs(spec)
    num_blocks = -(-num_inputs // fmt.block_size)
    padded = num_blocks * fmt.block_size
    scope = f"{name}.rows"

    def gathered(part: str, num_values: int) -> ir.Value:
        """Integers of the rows, one a byte."""
        num_bytes = -(-num_values * fmt.bits // 8)
        stored = nodes.stored(f"{name}.{part}", ir.DataType.UINT8, (num_rows, num_bytes))
        values = nodes.op(scope, "Gather", [stored, ids], axis=0)
        if fmt.bits == 4:
            values = _unpacked(nodes, scope, values)
            if num_values % 2:
                values = _first(nodes, scope, values, num_values, axis=2)
        return values

    scales = nodes.op(scope, "Gather", [nodes.stored(f"{name}.scales"), ids], axis=0)
    if f"{name}.zero_points" in nodes.weights.tensors:
        zero_points = gathered("zero_points", num_blocks)
    else:
        shape = nodes.op(scope, "Shape", [scales])
        zero_points = nodes.op(scope, "Expand", [_middle(nodes, fmt), shape])
    rows = nodes.op(
        scope,
        "DequantizeLinear",
        [gathered("rows", padded), scales, zero_points],
        axis=2,
        block_size=fmt.block_size,
    )
    return rows if padded == num_inputs else _first(nodes, scope, rows, num_inputs, axis=2)


def _middle(nodes: Nodes, fmt: Format) -> ir.Value:
    """The zero point of a symmetric format, uint8 `[]`."""
    return nodes.constant(np.array(1 << (fmt.bits - 1), np.uint8))


def _stored_zero_points(
    nodes: Nodes, name: str, fmt: Format, num_rows: int, num_blocks: int
) -> ir.Value:
    """uint8 or uint4 `[rows, blocks]`, as the bits say."""
    stored = f"{name}.zero_points"
    if fmt.bits == 8:
        return nodes.stored(stored)
    even = num_blocks + num_blocks % 2  # a row ends with its byte
    packed = nodes.stored(stored, ir.DataType.UINT4, (num_rows, even))
    if even == num_blocks:
        return packed
    # Slice is not defined for 4-bit integers
    wide = nodes.op(name, "Cast", [packed], to=int(ir.DataType.UINT8))
    wide = _first(nodes, name, wide, num_blocks, axis=1)
    return nodes.op(name, "Cast", [wide], to=int(ir.DataType.UINT4))


def _unpacked(nodes: Nodes, scope: str, packed: ir.Value) -> ir.Value:
    """From uint8 `(batch, length, bytes)` to its 4-bit integers as uint8, twice as many.

    Gather is not defined for 4-bit integers, so they are gathered as bytes and taken apart here.
    """
    low = nodes.op(scope, "BitwiseAnd", [packed, nodes.constant(np.array(15, np.uint8))])
    four = nodes.constant(np.array(4, np.uint8))
    high = nodes.op(scope, "BitShift", [packed, four], direction="RIGHT")
    last = nodes.constant(_LAST)
    pair = [nodes.op(scope, "Unsqueeze", [half, last]) for half in (low, high)]
    together = nodes.op(scope, "Concat", pair, axis=-1)
    shape = nodes.constant(np.array([0, 0, -1], np.int64))
    return nodes.op(scope, "Reshape", [together, shape])


def _first(nodes: Nodes, scope: str, value: ir.Value, count: int, axis: int) -> ir.Value:
    """The first `count` entries along an axis."""
    bounds = [nodes.constant(np.array([n], np.int64)) for n in (0, count, axis)]
    return nodes.op(scope, "Slice", [value, *bounds])
