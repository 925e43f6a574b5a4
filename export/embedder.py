"""Exports a text embedder: what it is asked for, checked, and the bundle that comes of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bundle import writer
from export.bundle.draft import Progress
from export.bundle.write_embedder import EmbedderDraft
from export.calibrate.text import CalibrationText, text_file
from export.calibration_source import (
    CalibrationSource,
    NoCalibration,
    OwnPage,
    SelfWritten,
    TextFile,
)
from export.errors import ExportRequestError
from export.formats.formats import Plan, plan_bytes
from export.formats.keep_source import MOST_BITS_KEPT, KeptWeights, kept_weights
from export.formats.projections import embedder_plan, projection_bytes
from export.formats.recipes import in_one_plane, plan_from_json, recipe_named
from export.formats.targets import check_plan
from export.options import MERGE, ExportOptions
from export.start_keras import start_keras
from gemma_keras.checkpoints.hub import is_text_embedder_preset
from gemma_keras.checkpoints.opening.sentence_transformers import (
    EmbedderCheckpoint,
    is_embedder,
    open_embedder,
)

if TYPE_CHECKING:
    from export.bundle.verify_embedder import EmbedderQuality

# Options that only make sense for a model that generates text, and what they are by default.
_OF_GENERATORS = {
    "base": None,
    "adapters": MERGE,
    "instruction_tuned": None,
    "kl_budget": None,
    "lowering": "fused",
    "kv_cache_dtype": "float32",
    "report": None,
}


def opened_embedder(source: Any) -> EmbedderCheckpoint | None:
    """A source as an embedder; `None` if it is something else.

    Args:
        source: a folder that sentence-transformers wrote, the name of one on the Hugging Face Hub,
            a folder that `GemmaTextEmbedder.save_to_preset` wrote, or a live `GemmaTextEmbedder`.

    Raises:
        ModelError: it is an embedder that cannot be read.
        ExportRequestError: a live model has no tokenizer.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "projection_dims"):
            return None
        try:
            return source.as_checkpoint()
        except ValueError as error:
            raise ExportRequestError(str(error)) from error
    if is_text_embedder_preset(source):
        start_keras()
        from gemma_keras.text_embedder import GemmaTextEmbedder

        return GemmaTextEmbedder.from_preset(source, dtype="float32").as_checkpoint()
    return open_embedder(source) if is_embedder(source) else None


@dataclasses.dataclass(frozen=True)
class EmbedderJob:
    """An embedder that is to be exported, all of it checked.

    Attributes:
        checkpoint: the embedder.
        recipe: its name.
        options: as they were given.
        plan: canonical name to format, projections included.
        max_tokens: the longest text.
        text: what to calibrate on.
        rows: of a text file, cut for the model; `None` if `text` is no file.
    """

    checkpoint: EmbedderCheckpoint
    recipe: str
    options: ExportOptions
    plan: Plan
    max_tokens: int
    text: CalibrationSource
    rows: CalibrationText | None

    @property
    def num_bytes(self) -> int:
        """Size of the weights file, alignment aside."""
        shapes = [matrix.shape for matrix in self.checkpoint.projections]
        return plan_bytes(self.plan, self.checkpoint.transformer.config) + projection_bytes(
            self.plan, shapes
        )


def prepare_embedder(
    checkpoint: EmbedderCheckpoint, recipe: str, options: ExportOptions
) -> EmbedderJob:
    """Check what is asked for, before anything slow begins.

    Raises:
        ExportRequestError: an option cannot be used with an embedder.
        ExportError: there is no tokenizer.
    """
    for name, default in _OF_GENERATORS.items():
        if getattr(options, name) != default:
            raise ExportRequestError(
                f"{name} is for models that generate text, and this is an embedder; leave it out"
            )
    config = checkpoint.transformer.config
    shapes = [matrix.shape for matrix in checkpoint.projections]
    plan = embedder_plan(recipe, config, shapes)
    plan |= in_one_plane(plan_from_json(options.plan or {}, config))
    check_plan(plan, options.target)
    text = _calibration(options, recipe, plan)
    rows = None
    tokenizer = writer.open_tokenizer(checkpoint.transformer)
    if isinstance(text, TextFile):
        rows = text_file(text.path, tokenizer, config.context_length)
    return EmbedderJob(
        checkpoint, recipe, options, plan, _max_tokens(checkpoint, options), text, rows
    )


def _max_tokens(checkpoint: EmbedderCheckpoint, options: ExportOptions) -> int:
    most, asked = checkpoint.max_tokens, options.max_context
    if asked is None:
        return most
    if not 3 <= asked <= most:
        raise ExportRequestError(
            f"--max-context must be 3 to {most:,} tokens, the embedder's longest text; {asked:,} "
            "is not"
        )
    return asked


def _calibration(options: ExportOptions, recipe: str, plan: Plan) -> CalibrationSource:
    """What to calibrate on: a page where a model that generates would write its own text."""
    asked = options.calibration_source
    if asked is None:
        own = recipe_named(recipe).calibration
        return OwnPage() if isinstance(own, SelfWritten) else own
    if isinstance(asked, SelfWritten):
        raise ExportRequestError(
            "an embedder writes no text to calibrate on; use --calibration text, none or a file"
        )
    if asked != NoCalibration() and not any(fmt.quantized for fmt in plan.values()):
        raise ExportRequestError(
            "float recipes are not calibrated: remove --calibration, or use int4"
        )
    return asked


def write_embedder(
    job: EmbedderJob, folder: Path, workspace: Path, on_progress: Progress
) -> tuple[int, EmbedderQuality | None, dict[str, Any]]:
    """Write a bundle into an unfinished folder.

    Args:
        job: what to export.
        folder: empty.
        workspace: where results of a calibration are kept until the export is done.
        on_progress: called with (stage, share of it that is done).

    Returns:
        Bytes of all its files, its quality if it was verified, and how its weights were rounded.

    Raises:
        ExportError: the bundle differs from the model, or does not run.
    """
    checkpoint, options = job.checkpoint, job.options
    transformer = checkpoint.transformer
    config = transformer.config
    draft = EmbedderDraft(
        folder, checkpoint, job.recipe, options.target, job.max_tokens, on_progress
    )
    if options.verify or job.text != NoCalibration():
        on_progress("keras", 0)
        start_keras(config)
    few = recipe_named(job.recipe).matrices.bits <= MOST_BITS_KEPT and options.plan is None
    kept = kept_weights(config, transformer.weights, MOST_BITS_KEPT if few else 0)
    rounding = _store(job, draft, kept, workspace, on_progress)
    bundle = draft.describe({"rounding": rounding})
    quality = None
    if options.verify:
        from export.bundle.verify_embedder import verify_embedder

        on_progress("verification", 0)
        quality = verify_embedder(
            bundle, config, transformer.weights, checkpoint.projections, job.recipe
        )
        on_progress("verification", 1)
        report = {"quality": dataclasses.asdict(quality), "rounding": rounding}
        bundle = draft.describe(report)
    return bundle.num_bytes, quality, rounding


def _store(
    job: EmbedderJob,
    draft: EmbedderDraft,
    kept: KeptWeights,
    workspace: Path,
    on_progress: Progress,
) -> dict[str, Any]:
    """Round the weights and store them; returns what was done, for the manifest."""
    plan = dict(job.plan) | dict(kept.formats)
    transformer = job.checkpoint.transformer
    if job.text == NoCalibration():
        draft.store(transformer.weights, plan, kept.matrix)
        return {}
    from export.choose_formats import round_weights  # it needs Keras

    rounding = round_weights(
        transformer, plan, kept, job.text, workspace, on_progress, rows=job.rows
    )
    draft.store(rounding.weights, plan, rounding.rounded)
    return dict(rounding.summary)
