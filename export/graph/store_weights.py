"""Writes the weights file from a weight source and a plan, with one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from edge_demo.bundle.manifest import EmbeddingSpec, StoredPart
from export.errors import ExportError
from export.formats.formats import Format, Plan, rows_and_inputs
from export.formats.fused_matrices import fused_matrices, joined_name
from export.formats.packing import Quantized, stored_tensors
from export.formats.projections import projection_specs
from export.formats.round_to_nearest import round_to_nearest, search_scales
from export.graph.weights_file import WeightsFile
from gemma_keras.checkpoints.names import WeightSpec, head_table, weight_specs
from gemma_keras.checkpoints.source import row_chunks, table_chunks
from gemma_keras.config import GemmaConfig

_NARROWEST = 1e-4  # scale of a column relative to the largest
_TINY = 1e-30  # a table of zeros has scales, too


def store_weights(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    plan: Plan,
    file: WeightsFile,
    on_progress: Callable[[int, int], None],
    rounded: Callable[[str, Format], Quantized | None] = lambda name, fmt: None,
    has_head: bool = True,
) -> None:
    """Write every weight in its planned format.

    A norm is stored as the factor `1 + scale` that ONNX's norms take. A table by rows is divided by
    scales of its columns, which are stored as `NAME.columns`; those of the head also multiply the
    factors of the final norm, whose outputs it multiplies. A quantized matrix is stored
    as `NAME.quantized` and `NAME.scales`, with `NAME.zero_points` where blocks have their own; in
    two planes as `NAME.high` and `NAME.low`. A table's integers are named a second time, `.rows`
    for `.quantized` and so on, in the shape that `GatherBlockQuantized` takes. Matrices that are
    fused (`export.formats.fused_matrices`) lie one after another, and can be read under the name
    of all as well.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        plan: canonical name to format, for all but the norms.
        file: open for writing.
        on_progress: called with (parameters stored so far, all of them).
        rounded: weights that are already quantized, by name and format; the others are rounded to
            nearest.
        has_head: whether the model makes logits; an embedder does not.

    Raises:
        ExportError: a weight does not fit float16, but the plan requires it.
    """
    head = head_table(config) if has_head else None
    specs = weight_specs(config)
    total = sum(int(np.prod(spec.shape)) for spec in specs.values())
    done = 0
    fused = fused_matrices(config, plan)
    others = {name for names in fused.values() for name in names[1:]}
    columns = {
        name: _column_scales(weights, name)
        for name, spec in specs.items()
        if spec.kind == "table" and plan[name].by_rows
    }
    for spec in specs.values():
        if spec.kind == "norm":
            factors = 1 + weights[spec.name]
            if spec.name == "final_norm" and head in columns:
                factors = factors * columns[head]
            file.add(spec.name, factors.astype(np.float32))
        elif spec.name in others:
            pass  # with the first of them
        elif plan[spec.name].quantized:
            together = [specs[name] for name in fused.get(spec.name, (spec.name,))]
            own = columns.get(spec.name)
            _store_quantized(together, weights, plan[spec.name], file, rounded, own)
        else:
            _store_float(spec, weights, plan[spec.name], file)
        done += int(np.prod(spec.shape))
        on_progress(done, total)


def store_projections(projections: Sequence[np.ndarray], plan: Plan, file: WeightsFile) -> None:
    """Write an embedder's projections in their planned formats.

    Args:
        projections: float32 `(in, out)` each, first to last.
        plan: canonical name to format.
        file: open for writing.

    Raises:
        ExportError: a weight does not fit float16, but the plan requires it.
    """
    specs = projection_specs([matrix.shape for matrix in projections])
    for (name, spec), matrix in zip(specs.items(), projections, strict=True):
        if plan[name].quantized:
            _store_quantized([spec], {name: matrix}, plan[name], file, _not_yet, None)
        else:
            _store_float(spec, {name: matrix}, plan[name], file)


def _not_yet(name: str, fmt: Format) -> None:
    """Nothing is rounded before."""


def embedding_spec(config: GemmaConfig, plan: Plan, file: WeightsFile) -> EmbeddingSpec:
    """Returns where and how `store_weights` stored the embedding table."""
    fmt, tensors = plan["token_embedding"], file.tensors
    parts = {
        part: tensors[name]
        for part in ("quantized", "high", "low", "scales", "zero_points", "columns")
        if (name := f"token_embedding.{part}") in tensors
    }
    if not fmt.quantized:
        parts["rows"] = tensors["token_embedding"]
    return EmbeddingSpec(
        rows=config.vocabulary_size,
        width=config.hidden_dim,
        bits=fmt.bits,
        block_size=fmt.block_size,
        symmetric=fmt.symmetric,
        planes=fmt.planes,
        by_rows=fmt.by_rows,
        scale=config.embedding_scale,
        parts={n: StoredPart(s.offset, s.dtype.numpy().name) for n, s in parts.items()},
    )


def _store_float(
    spec: WeightSpec, weights: Mapping[str, np.ndarray], fmt: Format, file: WeightsFile
) -> None:
    dtype = np.dtype(np.float16 if fmt.bits == 16 else np.float32)
    file.reserve(spec.name, dtype, spec.shape)
    is_table = spec.kind == "table"
    chunks = table_chunks(weights, spec.name) if is_table else [(0, weights[spec.name])]
    for first, chunk in chunks:
        with np.errstate(over="ignore"):
            stored = chunk.astype(dtype, copy=False)
        if fmt.bits == 16 and not np.isfinite(stored).all():
            raise ExportError(
                f"{spec.name} has values beyond 65,504, the largest float16; use another recipe"
            )
        file.write_rows(spec.name, first, stored)


def _store_quantized(
    specs: Sequence[WeightSpec],
    weights: Mapping[str, np.ndarray],
    fmt: Format,
    file: WeightsFile,
    rounded: Callable[[str, Format], Quantized | None],
    columns: np.ndarray | None,
) -> None:
    """Store a matrix or a table, or fused matrices one after another."""
    label = joined_name([spec.name for spec in specs])
    num_rows = [rows_and_inputs(spec)[0] for spec in specs]
    for i, spec in enumerate(specs):
        before = sum(num_rows[:i])
        for first, chunk in _chunks(spec, weights, fmt, rounded, columns):
            parts = stored_tensors(chunk, fmt)
            for part, array in parts.items():
                name = f"{label}.{part}"
                if not before + first:
                    file.reserve(name, array.dtype, (sum(num_rows), *array.shape[1:]))
                file.write_rows(name, before + first, array)
                if label != spec.name and not first:
                    file.add_rows(f"{spec.name}.{part}", name, before, num_rows[i])
    if columns is not None:
        file.add(f"{label}.columns", columns)
    elif specs[0].kind == "table":
        width = specs[0].shape[1] * (fmt.bits // fmt.planes) // 8
        for part in ("quantized",) if fmt.planes == 1 else ("high", "low"):
            rows_of = "rows" if part == "quantized" else f"{part}.rows"
            file.add_view(f"{label}.{rows_of}", f"{label}.{part}", (num_rows[0], width))


def _chunks(
    spec: WeightSpec,
    weights: Mapping[str, np.ndarray],
    fmt: Format,
    rounded: Callable[[str, Format], Quantized | None],
    columns: np.ndarray | None,
) -> Iterator[tuple[int, Quantized]]:
    """A weight on its grid, from row to row; of one by rows the scales are searched."""
    whole = rounded(spec.name, fmt)
    if whole is not None:
        yield 0, whole
        return
    is_table = spec.kind == "table"
    chunks = table_chunks(weights, spec.name) if is_table else row_chunks(weights[spec.name].T)
    for first, rows in chunks:
        if columns is not None:
            rows = rows / columns
        yield first, search_scales(rows, fmt) if fmt.by_rows else round_to_nearest(rows, fmt)


def _column_scales(weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The largest magnitude in each column of a table, about 1 in the geometric mean, `[width]`.

    A few columns of a Gemma's embedding are ten times as large as the others, and a row has only
    one scale. Divided by these first, it loses a sixth (docs/lab-notes.md).
    """
    greatest = np.float32(0)
    for _, rows in table_chunks(weights, name):
        greatest = np.maximum(greatest, np.abs(rows).max(axis=0))
    logs = np.log(np.maximum(greatest, greatest.max() * _NARROWEST + _TINY).astype(np.float64))
    return np.exp(logs - logs.mean()).astype(np.float32)
