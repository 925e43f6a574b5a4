"""From a weight source and a plan to the weights file: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from export.quantize.formats import Plan, quantize_rows, rows_and_inputs
from export.weights_file import WeightsFile
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.config import GemmaConfig


def store_weights(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    plan: Plan,
    file: WeightsFile,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write every weight in its planned format.

    A norm is stored as the factor `1 + scale` that ONNX's norms take. A quantized matrix is stored
    as `NAME.quantized` and `NAME.scales`; a quantized table also as `NAME.rows`, the same bytes in
    the shape that `GatherBlockQuantized` takes.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        plan: canonical name to format, for all but the norms.
        file: open for writing.
        on_progress: told the parameters stored so far and those in all.
    """
    specs = weight_specs(config)
    total = sum(int(np.prod(spec.shape)) for spec in specs.values())
    done = 0
    for spec in specs.values():
        _store(spec, weights[spec.name], plan, file)
        done += int(np.prod(spec.shape))
        on_progress(done, total)


def _store(spec: WeightSpec, array: np.ndarray, plan: Plan, file: WeightsFile) -> None:
    if spec.kind == "norm":
        file.add(spec.name, (1 + array).astype(np.float32))
        return
    fmt = plan[spec.name]
    if not fmt.quantized:
        file.add(spec.name, array.astype(np.float32, copy=False))
        return
    packed, scales = quantize_rows(array.T if spec.kind == "matrix" else array, fmt)
    file.add(f"{spec.name}.quantized", packed)
    file.add(f"{spec.name}.scales", scales)
    if spec.kind == "table":
        file.add_view(f"{spec.name}.rows", f"{spec.name}.quantized", rows_and_inputs(spec))
