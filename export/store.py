"""From a weight source and a plan to the weights file: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from export.errors import ExportError
from export.quantize.formats import Format, Plan, rows_and_inputs
from export.quantize.packing import Quantized, stored_tensors
from export.quantize.rounding import round_to_nearest
from export.weights_file import WeightsFile
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.config import GemmaConfig

_PIECE_BYTES = 64 << 20


def store_weights(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    plan: Plan,
    file: WeightsFile,
    on_progress: Callable[[int, int], None],
    rounded: Callable[[str, Format], Quantized | None] = lambda name, fmt: None,
) -> None:
    """Write every weight in its planned format.

    A norm is stored as the factor `1 + scale` that ONNX's norms take. A quantized matrix is stored
    as `NAME.quantized` and `NAME.scales`, with `NAME.zero_points` where blocks have their own; in
    two planes as `NAME.high` and `NAME.low`. A table's integers are named a second time, `.rows`
    for `.quantized` and so on, in the shape that `GatherBlockQuantized` takes.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        plan: canonical name to format, for all but the norms.
        file: open for writing.
        on_progress: told the parameters stored so far and those in all.
        rounded: what is on a lattice already, by name and format; the rest is rounded to nearest.

    Raises:
        ExportError: a weight does not fit float16 where the plan asks for it.
    """
    specs = weight_specs(config)
    total = sum(int(np.prod(spec.shape)) for spec in specs.values())
    done = 0
    for spec in specs.values():
        if spec.kind == "norm":
            file.add(spec.name, (1 + weights[spec.name]).astype(np.float32))
        elif plan[spec.name].quantized:
            _store_quantized(spec, weights, plan[spec.name], file, rounded)
        else:
            _store_float(spec.name, weights[spec.name], plan[spec.name], file)
        done += int(np.prod(spec.shape))
        on_progress(done, total)


def _store_float(name: str, array: np.ndarray, fmt: Format, file: WeightsFile) -> None:
    if fmt.bits == 16:
        with np.errstate(over="ignore"):
            array = array.astype(np.float16)
        if not np.isfinite(array).all():
            raise ExportError(f"{name} holds values beyond float16's 65,504; use another recipe")
    file.add(name, array.astype(np.float16 if fmt.bits == 16 else np.float32, copy=False))


def _store_quantized(
    spec: WeightSpec,
    weights: Mapping[str, np.ndarray],
    fmt: Format,
    file: WeightsFile,
    rounded: Callable[[str, Format], Quantized | None],
) -> None:
    num_rows, num_inputs = rows_and_inputs(spec)
    quantized = rounded(spec.name, fmt)
    if quantized is not None:
        for part, array in stored_tensors(quantized, fmt).items():
            file.add(f"{spec.name}.{part}", array)
    else:
        array = weights[spec.name]
        rows = array.T if spec.kind == "matrix" else array
        step = max(1, _PIECE_BYTES // (4 * num_inputs))
        for first in range(0, num_rows, step):
            piece = stored_tensors(round_to_nearest(rows[first : first + step], fmt), fmt)
            for part, array in piece.items():
                name = f"{spec.name}.{part}"
                if not first:
                    file.reserve(name, array.dtype, (num_rows, *array.shape[1:]))
                file.write_rows(name, first, array)
    if spec.kind == "table":
        width = num_inputs * (fmt.bits // fmt.planes) // 8
        for part in ("quantized",) if fmt.planes == 1 else ("high", "low"):
            rows_of = "rows" if part == "quantized" else f"{part}.rows"
            file.add_view(f"{spec.name}.{rows_of}", f"{spec.name}.{part}", (num_rows, width))
