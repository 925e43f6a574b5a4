"""Defines the targets: kinds of processors that a bundle can be made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from export.errors import ExportRequestError
from export.formats.recipes import recipe_named

ANY = "any"


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of processor.

    Attributes:
        machines: for people: which boards have it.
        instead: a recipe to the one that stands for it there.
        slow: recipes that are too slow there.
        one_token_attention: whether the attention of a single token takes fewer instructions as
            `export.graph.one_token` has it.
    """

    machines: str
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    slow: frozenset[str] = frozenset()
    one_token_attention: bool = False


TARGETS = {
    ANY: Target("any processor"),
    # Without 8-bit dot products onnxruntime dequantizes blocks of 8 bits for every token.
    "armv8.0": Target(
        "Raspberry Pi 4, 3 and Zero 2 W",
        {"int8": "int8-rows"},
        frozenset({"int4", "fp16", "fp32"}),
        one_token_attention=True,
    ),
    # With dot products, but without matrix products of 8 bits (i8mm): kernels keep two sums beside
    # the scale of each block of 8 bits.
    "armv8.2": Target("Raspberry Pi 5", {"int8": "int8-wide"}, one_token_attention=True),
}


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
