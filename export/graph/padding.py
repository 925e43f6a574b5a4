"""Adds ONNX operators to `model.onnx` that handle padding anywhere in `attention_mask`.

transformers, Optimum and transformers.js pad prompts on the left. `GroupQueryAttention` and the
traced layers need a row's tokens one after another from position 0. So the real tokens of a call
are moved to the front, and the model's outputs are moved back. The cache of a row has the keys and
values of its real tokens, then those of padding, which the next tokens overwrite. Only the ids and
the last hidden states move. A row without padding stays bit-identical.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

_TO_THE_END = np.iinfo(np.int64).max


class AddNode(Protocol):
    """Adds a node of one output, which is called by the name; returns that."""

    def __call__(
        self, op_type: str, inputs: list[ir.Value], name: str, /, **attributes: Any
    ) -> ir.Value: ...


class AddConstant(Protocol):
    """Adds a small constant under a name."""

    def __call__(self, name: str, array: np.ndarray, /) -> ir.Value: ...


@dataclasses.dataclass(frozen=True)
class Unpadded:
    """The tokens of a call without the padding between them.

    Attributes:
        ids: int64 `(batch, sequence_length)`, of each row the real tokens first, in their order.
        places: the index of each token of the call in `ids`, int64 of the same shape.
        past: real tokens before this call, int64 `(batch,)`: the first new token's position.
        length: tokens of the call, int64 `(1,)`.
    """

    ids: ir.Value
    places: ir.Value
    past: ir.Value
    length: ir.Value


def without_padding(op: AddNode, constant: AddConstant, ids: ir.Value, mask: ir.Value) -> Unpadded:
    """Move the real tokens of each row to its beginning.

    Args:
        op: adds a node.
        constant: adds a constant.
        ids: int64 `(batch, sequence_length)`.
        mask: 1 for a real token, else 0, int64 `(batch, total_sequence_length)`; the last columns
            are those of `ids`. A token has the same value in every later call.
    """
    axis, one = constant("axis_1", np.array([1], np.int64)), constant("one", np.array(1, np.int64))
    length = op("Shape", [ids], "padding.length", start=1, end=2)
    first = op("Neg", [length], "padding.first")
    end = constant("end", np.array([_TO_THE_END], np.int64))
    new = op("Slice", [mask, first, end, axis], "padding.new")

    count = op("ReduceSum", [new, axis], "padding.new.count", keepdims=1)
    total = op("ReduceSum", [mask, axis], "padding.count", keepdims=1)
    past = op("Squeeze", [op("Sub", [total, count], "padding.past.column"), axis], "padding.past")

    # Real tokens in their order, then the padding in its own.
    index = constant("index_1", np.array(1, np.int64))
    up_to = op("CumSum", [new, index], "padding.new.up_to")
    real = op("Sub", [up_to, one], "padding.real")
    zero = constant("zero", np.array(0, np.int64))
    scalar = op("Squeeze", [length], "padding.length.scalar")
    columns = op("Range", [zero, scalar, one], "padding.columns")
    others = op("Sub", [columns, up_to], "padding.others")
    behind = op("Add", [others, count], "padding.behind")
    is_real = op("Equal", [new, one], "padding.is_real")
    places = op("Where", [is_real, real, behind], "padding.places")
    moved = op("ScatterElements", [ids, places, ids], "padding.ids", axis=1)
    return Unpadded(moved, places, past, length)


def moved_back(op: AddNode, constant: AddConstant, hidden: ir.Value, tokens: Unpadded) -> ir.Value:
    """Moves the model's outputs for `tokens.ids` back to the original places of the tokens.

    Args:
        op: adds a node.
        constant: adds a constant.
        hidden: float `(batch, sequence_length, hidden_dim)`.
        tokens: as `without_padding` returned them.
    """
    last = constant("axis_-1", np.array([-1], np.int64))
    places = op("Unsqueeze", [tokens.places, last], "padding.places.column")
    return op("GatherND", [hidden, places], "hidden.moved_back", batch_dims=1)
