"""Defines the storage format of a weight, and the plan that gives each weight its format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.config import GemmaConfig

BITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128)  # that onnxruntime's CPU kernels take


@dataclasses.dataclass(frozen=True)
class Format:
    """How one matrix or table is stored.

    Attributes:
        bits: 32 or 16 for floats; 8, 4 or 2 for block-quantized integers.
        block_size: inputs that share a scale; 0 for floats.
        symmetric: whether the zero point is the middle, `2 ** (bits - 1)`, in every block; else
            each block has its own.
        planes: 2 splits each 8-bit integer into two of 4 bits, stored separately. The high plane is
            a symmetric 4-bit table with the same scales, 16 times as wide. The low plane has the
            zero points.
        terms: 1 or 2 for a matrix of 8-bit integers that is multiplied by 8-bit integers, with one
            scale a row: a token's activations are the sum of as many such integers, each with one
            scale. 0 where a product rounds activations with a scale for each block.
    """

    bits: int
    block_size: int = 0
    symmetric: bool = True
    planes: int = 1
    terms: int = 0

    def __post_init__(self) -> None:
        if not self.quantized:
            good = self.bits in (16, 32) and not self.block_size and self.symmetric
        else:
            good = self.bits in BITS and self.block_size > 0
        if self.planes != 1:
            good = good and (self.planes, self.bits, self.symmetric) == (2, 8, False)
        if self.terms:
            good = good and (self.bits, self.symmetric, self.planes) == (8, True, 1)
            good = good and self.terms in (1, 2)
        if not good:
            raise ValueError(f"the format is not supported: {self}")

    @property
    def quantized(self) -> bool:
        """Whether it is stored as integers with scales."""
        return self.bits < 16

    @property
    def by_rows(self) -> bool:
        """Whether a row has one scale, and a product needs no dot product of 8-bit integers."""
        return self.terms > 0

    @property
    def middle(self) -> int:
        """The zero point of a symmetric block: what stores 0."""
        return 1 << (self.bits - 1)

    @property
    def high_plane(self) -> Format:
        """Of a format in two planes: that of the higher 4 bits."""
        return Format(4, self.block_size)

    @property
    def low_plane(self) -> Format:
        """Of a format in two planes: that of the lower 4 bits."""
        return Format(4, self.block_size, symmetric=False)

    def num_blocks(self, num_inputs: int) -> int:
        """Blocks of one row."""
        return -(-num_inputs // self.block_size)

    def num_bytes(self, num_rows: int, num_inputs: int) -> int:
        """Size of a matrix with `num_rows` outputs and `num_inputs` inputs, in bytes."""
        if not self.quantized:
            return num_rows * num_inputs * self.bits // 8
        blocks = self.num_blocks(num_inputs)
        row = blocks * (self.block_size * self.bits // 8 + 4)
        if not self.symmetric:
            row += -(-blocks * (self.bits // self.planes) // 8)
        return num_rows * row

    def __str__(self) -> str:
        if not self.quantized:
            return f"fp{self.bits}"
        if self.by_rows:
            return f"int{self.bits} by rows, activations in {self.terms} x 8 bits"
        kind = " in 2 planes" if self.planes == 2 else "" if self.symmetric else " asymmetric"
        return f"int{self.bits} block {self.block_size}{kind}"


Plan = Mapping[str, Format]


def plan_bytes(plan: Plan, config: GemmaConfig) -> int:
    """Size of the weights file under a plan, in bytes, alignment aside."""
    total = 0
    for spec in weight_specs(config).values():
        if spec.kind == "norm":
            total += 4 * spec.shape[0]
        else:
            total += plan[spec.name].num_bytes(*rows_and_inputs(spec))
            if spec.kind == "table" and plan[spec.name].by_rows:
                total += 4 * spec.shape[1]  # a scale for each column
    return total


def rows_and_inputs(spec: WeightSpec) -> tuple[int, int]:
    """Outputs and inputs of a matrix; rows and width of a table."""
    return (
        (spec.shape[1], spec.shape[0]) if spec.kind == "matrix" else (spec.shape[0], spec.shape[1])
    )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for the bundle; `terms` only where a format has any."""
    return {
        name: {k: v for k, v in dataclasses.asdict(fmt).items() if v or k != "terms"}
        for name, fmt in plan.items()
    }
