"""Defines the recipes: named ways to store a model."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from export.calibration_source import CalibrationSource, NoCalibration, OwnPage, SelfWritten
from export.errors import ExportRequestError
from export.formats.formats import BLOCK_SIZES, Format, Plan, rows_and_inputs
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig

INT8 = Format(8, 32)
# Blocks of 128 lose more than those of 32, but the matrices that int4 raises to 8 bits compensate
# for it, and a product takes three quarters of the time.
INT4 = Format(4, 128, symmetric=False)
# Of a table: generation reads the high plane, and the low one for the few tokens that it proposes.
TWO_PLANES = Format(8, 128, symmetric=False, planes=2)
_FINE_INT8 = Format(8, 16)
# The format to which `int4` raises a matrix; compared with 4 bits, its block size hardly matters.
_RAISED = Format(8, 128)
_WHOLE_ROW = 1  # stands for the length of a row
BY_ROWS = Format(8, _WHOLE_ROW, terms=1)
# Of matrices that lose most by activations of 8 bits.
_TWO_TERMS = Format(8, _WHOLE_ROW, terms=2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named way to store a model.

    Attributes:
        matrices: the format of the decoder blocks' matrices.
        table: the format of the token embedding and the head; its blocks are made as much smaller
            as the model's width asks.
        finer: the format of some matrices instead of `matrices`, by their name within a block.
        most_kl: mean KL divergence from the float model in nats, on the text of the verification,
            beyond which a bundle must be wrong and is not written.
        most_cosine_distance: the same for an embedder: 1 minus the least cosine of a text's vector
            to that of the float model.
        kl_budget: for a recipe that chooses formats by measurement, the maximum mean KL divergence
            from the float model in nats; `None` for a fixed recipe.
        calibration: the default calibration text. Calibration balances activations
            (`export.calibrate.balance`) and rounds low-bit matrices with error feedback
            (`export.calibrate.gptq`).
    """

    matrices: Format
    table: Format
    most_kl: float
    most_cosine_distance: float
    finer: Mapping[str, Format] = dataclasses.field(default_factory=dict)
    kl_budget: float | None = None
    calibration: CalibrationSource = dataclasses.field(default_factory=NoCalibration)

    def matrix_format(self, name: str) -> Format:
        """The format of a matrix by its canonical name, such as `layers.3.mlp.down`."""
        within_block = name.split(".", 2)[-1]
        return self.finer.get(within_block, self.matrices)


# Of `most_kl`: the 270M loses 1e-11 as fp32, 1e-3 as int8, 0.5 as int4 rounded to nearest
# everywhere; a random model as int8 up to 0.02; a wrong graph whole nats.
_LOSE_MOST = ("attention.key", "attention.value", "mlp.down")  # for their size
RECIPES = {
    "int4": Recipe(
        INT4,
        TWO_PLANES,
        most_kl=2.0,
        most_cosine_distance=0.3,
        kl_budget=0.033,
        calibration=SelfWritten(),
    ),
    # Blocks of 16 in three matrices remove a sixth of the total loss.
    "int8": Recipe(
        INT8,
        dataclasses.replace(TWO_PLANES, block_size=32),
        most_kl=0.1,
        most_cosine_distance=0.02,
        finer=dict.fromkeys(_LOSE_MOST, _FINE_INT8),
        calibration=OwnPage(),
    ),
    # For processors without 8-bit dot products: see `export.formats.targets`.
    "int8-rows": Recipe(
        BY_ROWS,
        _TWO_TERMS,
        most_kl=0.2,
        most_cosine_distance=0.02,
        finer=dict.fromkeys(_LOSE_MOST, _TWO_TERMS),
        calibration=OwnPage(),
    ),
    # For processors whose kernels keep two sums beside the scale of a block: see the same.
    "int8-wide": Recipe(
        dataclasses.replace(INT8, block_size=64),
        dataclasses.replace(TWO_PLANES, block_size=32),
        most_kl=0.1,
        most_cosine_distance=0.02,
        finer={"attention.key": _FINE_INT8, "attention.value": _FINE_INT8, "mlp.down": INT8},
        calibration=OwnPage(),
    ),
    "fp16": Recipe(Format(16), Format(16), most_kl=1e-3, most_cosine_distance=1e-4),
    "fp32": Recipe(Format(32), Format(32), most_kl=1e-5, most_cosine_distance=1e-6),
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ExportRequestError: no recipe has that name.
    """
    if name not in RECIPES:
        raise ExportRequestError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def table_format(config: GemmaConfig) -> Format:
    """Two planes of 4 bits that fit the model's embedding."""
    return fitting(TWO_PLANES, config.hidden_dim)


def plan_for_recipe(recipe: str, config: GemmaConfig) -> dict[str, Format]:
    """Every matrix's and table's format under a named recipe, before any is chosen by measurement.

    Raises:
        ExportRequestError: there is no such recipe, or the model does not fit its blocks.
    """
    chosen = recipe_named(recipe)
    plan = {}
    for spec in weight_specs(config).values():
        if spec.kind == "norm":
            continue
        width = rows_and_inputs(spec)[1]
        fmt = chosen.table if spec.kind == "table" else chosen.matrix_format(spec.name)
        plan[spec.name] = fitting(fmt, width) if fmt.by_rows or spec.kind == "table" else fmt
    _check_table(plan["token_embedding"], config)
    return plan


def in_one_plane(plan: Plan) -> dict[str, Format]:
    """A plan of the same numbers, for graphs that read all bits of a table alike."""
    return {
        name: Format(8, fmt.block_size) if fmt.planes == 2 else fmt for name, fmt in plan.items()
    }


def fitting(fmt: Format, width: int) -> Format:
    """The same with the largest blocks, up to its own, that divide the width; itself if none do."""
    if not fmt.quantized:
        return fmt
    if fmt.by_rows:
        return dataclasses.replace(fmt, block_size=width)
    fit = [size for size in BLOCK_SIZES if size <= fmt.block_size and width % size == 0]
    return dataclasses.replace(fmt, block_size=max(fit, default=fmt.block_size))


def raised_plan(config: GemmaConfig) -> dict[str, Format]:
    """Returns the format of each matrix for which the 4 bits of `int4` are not enough."""
    return {
        spec.name: fitting(_RAISED, rows_and_inputs(spec)[1])
        for spec in weight_specs(config).values()
        if spec.kind == "matrix"
    }


def plan_from_json(entries: Mapping[str, Any], config: GemmaConfig) -> dict[str, Format]:
    """A plan that comes from elsewhere, such as another bundle's, checked.

    Raises:
        ExportRequestError: it names an unknown weight or an unsupported format.
    """
    specs = {s.name: s for s in weight_specs(config).values() if s.kind != "norm"}
    if not isinstance(entries, Mapping):
        raise ExportRequestError(
            "a plan must be a JSON object that maps each weight's name to its format"
        )
    plan = {}
    for name, entry in entries.items():
        if name not in specs:
            raise ExportRequestError(
                f"the plan names {reprlib.repr(name)}, which this model does not have; it has "
                f"{', '.join(list(specs)[:3])} and {len(specs) - 3} more"
            )
        fields = {field.name: field for field in dataclasses.fields(Format)}
        if not isinstance(entry, Mapping) or not entry.keys() <= fields.keys():
            raise ExportRequestError(
                f"the plan's entry for {name} must be an object with the keys {', '.join(fields)}"
            )
        try:
            fmt = Format(**{key: _whole(value) for key, value in entry.items()})
        except (TypeError, ValueError):
            raise ExportRequestError(
                f"the plan gives {name} an unsupported format: {reprlib.repr(dict(entry))}"
            ) from None
        row = rows_and_inputs(specs[name])[1]
        if fmt.by_rows and fmt.block_size != row:
            raise ExportRequestError(
                f"the plan gives {name} a block of {fmt.block_size} by rows; a row has {row}"
            )
        if fmt.quantized and not fmt.by_rows and fmt.block_size not in BLOCK_SIZES:
            raise ExportRequestError(
                f"the plan gives {name} blocks of {fmt.block_size}; onnxruntime supports "
                f"{', '.join(map(str, BLOCK_SIZES))}"
            )
        if fmt.planes == 2 and specs[name].kind != "table":
            raise ExportRequestError(
                f"the plan splits {name} in 2 planes, but only embedding tables can be split"
            )
        plan[name] = fmt
    for name in plan.keys() & {"token_embedding", "head"}:
        _check_table(plan[name], config)
    return plan


def _whole(value: Any) -> Any:
    if not isinstance(value, int):  # a bool is one
        raise TypeError
    return value


def _check_table(fmt: Format, config: GemmaConfig) -> None:
    if fmt.quantized and config.hidden_dim % fmt.block_size:
        # Gather reads unpadded rows, the head's matrix product padded ones: the one stored table
        # serves both only without padding.
        raise ExportRequestError(
            f"the embedding would be stored in blocks of {fmt.block_size}, which does not "
            f"divide hidden_dim ({config.hidden_dim}); use --recipe fp32"
        )
