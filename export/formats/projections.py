"""The matrices of a text embedder after its pooling, as weights with names and formats.

`projections.0` multiplies the pooled hidden state, `projections.1` the result of it, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from export.formats.formats import Format, Plan, rows_and_inputs
from export.formats.recipes import fitting, in_one_plane, plan_for_recipe, recipe_named
from gemma_keras.checkpoints.names import WeightSpec
from gemma_keras.config import GemmaConfig

Shapes = Sequence[tuple[int, ...]]


def projection_specs(shapes: Shapes) -> dict[str, WeightSpec]:
    """Canonical name to weight, in the order of use.

    Args:
        shapes: `(in, out)` each, first to last.
    """
    names = [f"projections.{i}" for i in range(len(shapes))]
    return {
        name: WeightSpec(name, tuple(shape), "matrix", "linear.weight", name)
        for name, shape in zip(names, shapes, strict=True)
    }


def embedder_plan(recipe: str, config: GemmaConfig, shapes: Shapes) -> dict[str, Format]:
    """Every matrix's and table's format under a named recipe.

    The embedding table is in one plane, since an embedder has no head that would read half of it.

    Raises:
        ExportRequestError: there is no such recipe, or the model does not fit its blocks.
    """
    plan = in_one_plane(plan_for_recipe(recipe, config))
    for name, spec in projection_specs(shapes).items():
        plan[name] = fitting(recipe_named(recipe).matrices, rows_and_inputs(spec)[1])
    return plan


def projection_bytes(plan: Plan, shapes: Shapes) -> int:
    """Size of the projections under a plan, in bytes."""
    specs = projection_specs(shapes)
    return sum(plan[name].num_bytes(*rows_and_inputs(spec)) for name, spec in specs.items())


def projection_count(shapes: Shapes) -> int:
    """Returns the number of parameters of the projections."""
    return sum(math.prod(shape) for shape in shapes)
