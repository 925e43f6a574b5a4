"""Named ways to store a model."""

from __future__ import annotations

import dataclasses

from export.errors import ExportRequestError
from export.quantize.formats import Format
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig

INT8 = Format(8, 32)
INT4 = Format(4, 32, symmetric=False)
TWO_PLANES = Format(8, 32, planes=2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named way to store a model.

    Attributes:
        matrices: the format of the decoder blocks' matrices.
        table: the format of the token embedding and the head.
        kl_budget: for a recipe that chooses formats by measurement: the mean KL divergence from
            the float model that it may lose, in nats; `None` for a fixed one.
        balanced: whether activations are balanced first; see `export.quantize.balance`.
    """

    matrices: Format
    table: Format
    kl_budget: float | None = None
    balanced: bool = False


RECIPES = {
    "int4": Recipe(INT4, TWO_PLANES, kl_budget=0.05, balanced=True),
    "int8": Recipe(INT8, INT8, balanced=True),
    "fp16": Recipe(Format(16), Format(16)),
    "fp32": Recipe(Format(32), Format(32)),
}


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
    """Every matrix's and table's format under a named recipe, before any is chosen by measurement.

    Raises:
        ExportRequestError: there is no such recipe, or the model does not fit its blocks.
    """
    chosen = recipe_named(recipe)
    plan = {
        spec.name: chosen.table if spec.kind == "table" else chosen.matrices
        for spec in weight_specs(config).values()
        if spec.kind != "norm"
    }
    block = plan["token_embedding"].block_size
    if block and config.hidden_dim % block:
        # Gather reads unpadded rows, the head's matrix product padded ones: the one stored table
        # serves both only without padding.
        raise ExportRequestError(
            f"recipe {recipe} stores the embedding in blocks of {block}, which does not divide "
            f"hidden_dim ({config.hidden_dim}); use --recipe fp32"
        )
    return plan
