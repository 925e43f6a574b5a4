"""The story of an export, from a checkpoint or a model to a bundle."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_demo.device.memory_limits import free_memory
from export.bundle import writer
from export.bundle.draft import BundleDraft, Progress
from export.calibrate.text import CalibrationText, Windows, read_windows, text_file
from export.calibrate.workspace import kept_work, workspace_path
from export.calibration_source import CalibrationSource, NoCalibration, TextFile
from export.embedder import opened_embedder, prepare_embedder, write_embedder
from export.errors import ExportError, ExportRequestError
from export.formats.formats import Plan, plan_bytes
from export.formats.keep_source import MOST_BITS_KEPT, KeptWeights, kept_weights
from export.formats.recipes import (
    Recipe,
    in_one_plane,
    plan_for_recipe,
    plan_from_json,
    recipe_named,
)
from export.formats.targets import check_plan, recipe_for
from export.open_source import Opened, opened_source
from export.options import BUDGET_NEEDS, ExportOptions
from export.start_keras import start_keras
from gemma_keras.checkpoints.adapters.write import PeftFiles
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.config import GemmaConfig

if TYPE_CHECKING:
    from export.bundle.verify import Quality
    from export.bundle.verify_embedder import EmbedderQuality
    from gemma_keras.causal_lm import GemmaCausalLM
    from gemma_keras.text_embedder import GemmaTextEmbedder

Write = Callable[[Path, Path, Progress], tuple[int, Any, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        path: the bundle.
        recipe: how its weights are stored.
        num_bytes: of all its files.
        quality: how near it is to the model, or `None` if that was not asked.
        rounding: how its weights were rounded, for people and programs.
        remarks: what reading the source has passed over or changed, a sentence each.
        adapters: names of those that were written into the bundle's folder, beside the base.
    """

    path: Path
    recipe: str
    num_bytes: int
    quality: Quality | EmbedderQuality | None
    rounding: Mapping[str, Any]
    remarks: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def export_onnx(
    source: str | os.PathLike[str] | GemmaCausalLM | GemmaTextEmbedder,
    out: str | os.PathLike[str],
    recipe: str = "int8",
    *,
    options: ExportOptions | None = None,
    on_progress: Progress = lambda stage, share: None,
    **fields: Any,
) -> ExportResult:
    """Write a bundle that `edge-demo` runs.

    Args:
        source: what `gemma_keras.open_checkpoint` takes, a `GemmaCausalLM`, or a live KerasHub
            Gemma; or an embedder: what `GemmaTextEmbedder.from_preset` takes, or one that is live.
        out: the folder to write; it gets this name only when it is complete.
        recipe: `int4`, `int8`, `int8-rows`, `int8-wide`, `fp16` or `fp32`.
        options: all that else can be chosen.
        on_progress: called with (stage, share of it that is done, 0 to 1).
        **fields: fields of `ExportOptions`, in place of those of `options`, such as
            `kl_budget=0.02` or `overwrite=True`.

    Raises:
        ExportRequestError: the recipe, an option or the output folder cannot be used.
        ModelError: the source cannot be used.
        ExportError: no space or memory, or the bundle differs from the model.
        TypeError: `ExportOptions` has no such field.
    """
    options = dataclasses.replace(options or ExportOptions(), **fields)
    recipe = recipe_for(recipe, options.target)
    out = Path(os.path.realpath(out))  # a link to a bundle stays, what it points at is replaced
    with _disk_errors_as_sentences(out):
        writer.check_out(out, overwrite=options.overwrite)
    embedder = opened_embedder(source)
    if embedder is not None:
        job = prepare_embedder(embedder, recipe, options)
        _check_space(out, job.num_bytes)
        write = functools.partial(write_embedder, job)
        result = ExportResult(out, recipe, 0, None, {}, embedder.transformer.remarks)
        return _export(write, result, options, on_progress)
    with opened_source(source, options.base, options.adapters) as opened:
        job = _prepare(opened, out, recipe, options)
        write = functools.partial(_write, job)
        remarks = job.checkpoint.remarks
        result = ExportResult(out, recipe, 0, None, {}, remarks, tuple(job.adapters))
        return _export(write, result, options, on_progress)


def _export(
    write: Write, result: ExportResult, options: ExportOptions, on_progress: Progress
) -> ExportResult:
    """Write a bundle into an unfinished folder, which then gets its name.

    Args:
        write: the contents, given the folder, the workspace and `on_progress`.
        result: what is known before.
        options: as they were given.
        on_progress: called with (stage, share of it that is done).
    """
    out = result.path
    workspace = workspace_path(out)
    try:
        with (
            _disk_errors_as_sentences(out),
            writer.unfinished_folder(out, overwrite=options.overwrite) as folder,
        ):
            num_bytes, quality, rounding = write(folder, workspace, on_progress)
    except BaseException as error:
        # Whatever went wrong, what was worked out until then is of use to the next run.
        if kept_work(out):
            error.add_note(
                f"intermediate results are kept in {workspace}, and the next export to "
                f"{out} continues from them; remove that folder to start again"
            )
        raise
    shutil.rmtree(workspace, ignore_errors=True)
    return dataclasses.replace(result, num_bytes=num_bytes, quality=quality, rounding=rounding)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is to be exported, all of it checked.

    Attributes:
        checkpoint: the model.
        adapters: what is written next to it, by name.
        recipe: its name.
        options: as they were given.
        formats: canonical name to format, before any is chosen by measurement.
        budget: the KL budget; `None` for formats that are fixed.
        max_context: the longest sequence, in tokens.
        text: what to calibrate on.
        rows: of a text file, cut for the model; `None` if `text` is no file.
        windows: the text of the report, if one is wanted.
    """

    checkpoint: Checkpoint
    adapters: Mapping[str, PeftFiles]
    recipe: str
    options: ExportOptions
    formats: Plan
    budget: float | None
    max_context: int
    text: CalibrationSource
    rows: CalibrationText | None
    windows: Windows | None


def _prepare(opened: Opened, out: Path, recipe: str, options: ExportOptions) -> _Job:
    """Check what is asked for, before anything slow begins."""
    checkpoint = opened.checkpoint
    if options.instruction_tuned is not None:
        checkpoint = dataclasses.replace(checkpoint, instruction_tuned=options.instruction_tuned)
    config = checkpoint.config
    config.require_causal("an ONNX bundle")
    chosen = recipe_named(recipe)
    formats = plan_for_recipe(recipe, config) | plan_from_json(options.plan or {}, config)
    check_plan(formats, options.target)
    if options.lowering == "traced":
        from export.graph.dequantize import check_format

        formats = in_one_plane(formats)
        for name, fmt in formats.items():
            check_format(name, fmt)
    budget = _budget(options, recipe)
    max_context = _check_context(options.max_context, config)
    text = _calibration(options, chosen, formats)
    rows = windows = None
    if isinstance(text, TextFile):
        rows = text_file(text.path, writer.open_tokenizer(checkpoint), config.context_length)
    if options.report is not None:
        tokenizer = writer.open_tokenizer(checkpoint)
        windows = read_windows(Path(options.report), tokenizer, max_context)
    needed = plan_bytes(formats, config) + sum(a.num_bytes for a in opened.adapters.values())
    if budget is not None:  # it may end with 8 bits everywhere, and keeps both until it is done
        needed += plan_bytes(plan_for_recipe("int8", config), config)
    _check_space(out, needed)
    if windows is not None:
        _check_memory(2 * plan_bytes(formats, config))
    return _Job(
        checkpoint,
        opened.adapters,
        recipe,
        options,
        formats,
        budget,
        max_context,
        text,
        rows,
        windows,
    )


def _write(
    job: _Job, folder: Path, workspace: Path, on_progress: Progress
) -> tuple[int, Quality | None, dict[str, Any]]:
    """Write a bundle into an unfinished folder.

    Returns:
        Bytes of all its files, its quality if it was verified, and how its weights were rounded.
    """
    checkpoint, options = job.checkpoint, job.options
    config = checkpoint.config
    draft = BundleDraft(
        folder,
        checkpoint,
        job.recipe,
        options.lowering,
        job.max_context,
        options.kv_cache_dtype,
        options.target,
        on_progress,
        job.adapters,
    )
    if options.verify or job.windows is not None or job.text != NoCalibration():
        on_progress("keras", 0)
        start_keras(config)
    # Few bits that a source already holds exactly are not rounded a second time.
    few = recipe_named(job.recipe).matrices.bits <= MOST_BITS_KEPT and options.plan is None
    kept = kept_weights(config, checkpoint.weights, MOST_BITS_KEPT if few else 0)
    rounding = _round(job, draft, kept, workspace, on_progress)
    quality = None
    if options.verify:
        from export.bundle.verify import verify as verify_bundle

        on_progress("verification", 0)
        quality = verify_bundle(draft.bundle, config, checkpoint.weights, job.recipe)
        on_progress("verification", 1)
    summary = {
        "quality": None if quality is None else dataclasses.asdict(quality),
        "rounding": rounding,
        "kl_by_group": rounding.get("losses"),
    }
    if job.windows is not None:
        from export.bundle.report import measure_on_text

        on_progress("report", 0)
        summary |= measure_on_text(
            draft.bundle, checkpoint, job.windows, lambda share: on_progress("report", share)
        )
    return draft.describe(summary).num_bytes, quality, rounding


def _round(
    job: _Job, draft: BundleDraft, kept: KeptWeights, workspace: Path, on_progress: Progress
) -> dict[str, Any]:
    """Round the weights and store them; returns what was done, for the manifest."""
    formats, text = dict(job.formats) | dict(kept.formats), job.text
    summary = {}
    if kept.sentence and any(fmt.quantized for fmt in formats.values()):
        summary["source"] = kept.sentence
    if job.budget is None and text == NoCalibration():
        draft.store(draft.checkpoint.weights, formats, kept.matrix)
        return summary
    from export.choose_formats import Rounding, round_weights, round_within  # they need Keras

    rounding = Rounding(draft.checkpoint.weights, kept.matrix, summary=summary)
    if text != NoCalibration():
        rounding = round_weights(
            draft.checkpoint, formats, kept, text, workspace, on_progress, rows=job.rows
        )
        rounding = dataclasses.replace(rounding, summary=summary | dict(rounding.summary))
    if job.budget is None:
        draft.store(rounding.weights, formats, rounding.rounded)
    else:
        rounding = round_within(job.budget, draft, rounding, formats, kept.formats, on_progress)
    return dict(rounding.summary)


def _budget(options: ExportOptions, recipe: str) -> float | None:
    """The KL budget to keep; `None` for formats that are fixed."""
    own = recipe_named(recipe).kl_budget
    if options.kl_budget is None:
        return own if options.plan is None else None
    if own is None:
        raise ExportRequestError(BUDGET_NEEDS)
    return options.kl_budget


def _calibration(options: ExportOptions, recipe: Recipe, formats: Plan) -> CalibrationSource:
    """What to calibrate on."""
    asked = options.calibration_source
    if asked is None:
        return recipe.calibration
    if asked != NoCalibration() and not any(fmt.quantized for fmt in formats.values()):
        raise ExportRequestError(
            "float recipes are not calibrated: remove --calibration, or use int4"
        )
    return asked


def _check_context(max_context: int | None, config: GemmaConfig) -> int:
    if max_context is None:
        return config.context_length
    if not 1 <= max_context <= config.context_length:
        raise ExportRequestError(
            f"--max-context must be within the model's context of {config.context_length:,} "
            f"tokens; {max_context:,} is not"
        )
    return max_context


def _check_space(out: Path, num_bytes: int) -> None:
    parent = next(p for p in out.parents if p.exists())
    free = shutil.disk_usage(parent).free
    needed = num_bytes + (16 << 20)  # graphs and tokenizer
    if needed > free:
        raise ExportError(
            f"the bundle needs about {needed / 1e6:,.0f} MB; {parent} has {free / 1e6:,.0f} MB free"
        )


def _check_memory(num_bytes: int) -> None:
    """Refuse to run a bundle that does not fit: its weights, as stored and as onnxruntime packs
    them."""
    free = free_memory()
    if free is not None and num_bytes > free:
        raise ExportError(
            "running the bundle on the text of the report needs about "
            f"{num_bytes / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free; export "
            "without --report"
        )


class _disk_errors_as_sentences:
    """Turns what the disk says while a bundle is being written into one sentence."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, OSError) and not isinstance(error, ExportError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ExportError(
                    f"no space was left while writing {self._out}; nothing was kept there"
                ) from error
            raise ExportError(f"cannot write {self._out}: {error.strerror or error}") from error
