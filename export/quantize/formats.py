"""Storage formats of one weight, and the plan that gives each weight its format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from export.errors import ExportRequestError
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.config import GemmaConfig


@dataclasses.dataclass(frozen=True)
class Format:
    """How one matrix or table is stored.

    Attributes:
        bits: 32 for float32, 8 for block-quantized integers.
        block_size: inputs that share a scale; 0 for float32.
    """

    bits: int
    block_size: int = 0

    @property
    def quantized(self) -> bool:
        """Whether it is stored as integers with scales."""
        return self.bits < 16

    def num_bytes(self, num_rows: int, num_inputs: int) -> int:
        """Size of a matrix with `num_rows` outputs and `num_inputs` inputs, in bytes."""
        if not self.quantized:
            return num_rows * num_inputs * self.bits // 8
        blocks = num_rows * -(-num_inputs // self.block_size)
        return blocks * (self.block_size * self.bits // 8 + 4)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named way to store a model.

    Attributes:
        format: of every matrix and table.
        balanced: whether activations are balanced first; see `export.quantize.balance`.
    """

    format: Format
    balanced: bool


RECIPES = {"fp32": Recipe(Format(32), balanced=False), "int8": Recipe(Format(8, 32), balanced=True)}

Plan = Mapping[str, Format]


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ExportRequestError: there is none.
    """
    if name not in RECIPES:
        raise ExportRequestError(
            f"no recipe is called {name!r}; choose one of {', '.join(RECIPES)}"
        )
    return RECIPES[name]


def plan_for_recipe(recipe: str, config: GemmaConfig) -> dict[str, Format]:
    """Every matrix's and table's format under a named recipe.

    Raises:
        ExportRequestError: there is no such recipe, or the model does not fit its blocks.
    """
    chosen = recipe_named(recipe).format
    plan = {spec.name: chosen for spec in weight_specs(config).values() if spec.kind != "norm"}
    block = plan["token_embedding"].block_size
    if block and config.hidden_dim % block:
        # Gather reads unpadded rows, the head's matrix product padded ones: the one stored table
        # serves both only without padding.
        raise ExportRequestError(
            f"recipe {recipe} stores the embedding in blocks of {block}, which does not divide "
            f"hidden_dim ({config.hidden_dim}); use --recipe fp32"
        )
    return plan


def plan_bytes(plan: Plan, config: GemmaConfig) -> int:
    """Size of the weights file under a plan, in bytes, alignment aside."""
    total = 0
    for spec in weight_specs(config).values():
        if spec.kind == "norm":
            total += 4 * spec.shape[0]
        else:
            total += plan[spec.name].num_bytes(*rows_and_inputs(spec))
    return total


def rows_and_inputs(spec: WeightSpec) -> tuple[int, int]:
    """Outputs and inputs of a matrix; rows and width of a table."""
    return (
        (spec.shape[1], spec.shape[0]) if spec.kind == "matrix" else (spec.shape[0], spec.shape[1])
    )


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for the bundle."""
    return {name: dataclasses.asdict(fmt) for name, fmt in plan.items()}


def quantize_rows(rows: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Round to nearest on a symmetric lattice with one scale a block.

    `value ≈ (stored - 128) * scale`, `scale = greatest magnitude in the block / 127`: what
    onnxruntime's `MatMulNBits` and `GatherBlockQuantized` take when they are given no zero points.
    A GGUF Q8_0 tensor comes out exactly as it went in, scale and integers.

    Args:
        rows: float32 `[outputs, inputs]`; inputs are padded with zeros to whole blocks.
        fmt: of 8 bits.

    Returns:
        uint8 `[outputs, blocks, block_size]` and float32 scales `[outputs, blocks]`.
    """
    if fmt.bits != 8:
        raise ValueError(f"quantize_rows stores 8 bits, not {fmt.bits}")
    num_rows, num_inputs = rows.shape
    num_blocks = -(-num_inputs // fmt.block_size)
    packed = np.empty((num_rows, num_blocks, fmt.block_size), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.float32)
    step = max(1, (8 << 20) // max(1, num_blocks * fmt.block_size * 4))  # pieces that fit a cache
    for first in range(0, num_rows, step):
        piece = np.ascontiguousarray(rows[first : first + step], dtype=np.float32)
        if num_blocks * fmt.block_size != num_inputs:
            piece = np.pad(piece, ((0, 0), (0, num_blocks * fmt.block_size - num_inputs)))
        blocks = piece.reshape(len(piece), num_blocks, fmt.block_size)
        scale = np.abs(blocks).max(axis=-1) / np.float32(127)
        # A block of zeros, or of values so small that their scale underflows, becomes zeros.
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-37)
        levels = np.rint(blocks * inverse[..., None])
        packed[first : first + step] = (np.clip(levels, -127, 127) + 128).astype(np.uint8)
        scales[first : first + step] = scale
    return packed, scales
