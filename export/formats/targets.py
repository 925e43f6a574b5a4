"""Defines the targets: kinds of processors that a bundle can be made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edge_demo.bundle.manifest import ANY_TARGET
from export.errors import ExportRequestError
from export.formats.formats import Plan
from export.formats.recipes import recipe_named

ANY = ANY_TARGET


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of processor.

    Attributes:
        machines: for people: which boards have it.
        instead: a recipe to the one that stands for it there.
        slow: recipes that are too slow there.
        one_token_attention: whether the attention of a single token takes fewer instructions as
            `export.graph.one_token` has it.
        by_rows: whether products with blocks are too slow there.
    """

    machines: str
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slow: frozenset[str] = frozenset()
    one_token_attention: bool = False
    by_rows: bool = False


TARGETS = {
    ANY: Target("any processor"),
    # Without 8-bit dot products onnxruntime dequantizes blocks of 8 bits for every token.
    "armv8.0": Target(
        "Raspberry Pi 4, 3 and Zero 2 W",
        {"int8": "int8-rows"},
        frozenset({"int4", "int8-wide", "fp16", "fp32"}),
        one_token_attention=True,
        by_rows=True,
    ),
    # With dot products, but without matrix products of 8 bits (i8mm): kernels keep two sums beside
    # the scale of each block of 8 bits.
    "armv8.2": Target(
        "Raspberry Pi 5", {"int8": "int8-wide"}, frozenset({"int8-rows"}), one_token_attention=True
    ),
}


def check_plan(plan: Plan, target: str) -> None:
    """Refuse formats that are slow on a target.

    Raises:
        ExportRequestError: a weight is planned in one.
    """
    slow = [name for name, fmt in plan.items() if not fmt.by_rows]
    if TARGETS[target].by_rows and slow:
        raise ExportRequestError(
            f"the plan stores {slow[0]} as {plan[slow[0]]}, which is slow on {target}; use 8 bits "
            "by rows (terms 1 or 2)"
        )


def recipe_for(recipe: str, target: str) -> str:
    """The name of the recipe that a target has in place of a named one.

    Args:
        recipe: its name.
        target: one of `TARGETS`.

    Raises:
        ExportRequestError: there is no such recipe, or it is slow there.
    """
    recipe_named(recipe)
    if recipe in TARGETS[target].slow:
        instead = " or ".join(TARGETS[target].instead)
        raise ExportRequestError(f"{recipe} is slow on {target}; use --recipe {instead} there")
    return TARGETS[target].instead.get(recipe, recipe)
