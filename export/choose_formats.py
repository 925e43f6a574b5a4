"""Preparing a model's weights for rounding, and choosing formats by what the whole then loses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_demo.device.memory_limits import free_memory
from export.bundle.draft import BundleDraft, Progress
from export.bundle.verify import Quality, compare_logits
from export.bundle.writer import open_tokenizer
from export.calibrate.budget import plan_within
from export.calibrate.calibrate import calibrate
from export.calibrate.reference import reference_logits
from export.calibrate.self_sample import memory_needed, self_sample
from export.calibrate.sensitivity import group_members, sensitivities
from export.calibrate.text import ROW_LENGTH, CalibrationText, page, split_rows, text_file
from export.calibrate.workspace import Workspace, fingerprint
from export.calibration_source import CalibrationSource, OwnPage, TextFile, identity
from export.errors import ExportRequestError
from export.formats.formats import BLOCK_SIZES, Format, Plan, plan_to_json
from export.formats.keep_source import KeptWeights
from export.formats.packing import Quantized
from export.formats.recipes import raised_plan
from export.formats.round_to_nearest import search_scales
from export.graph.run_in_chunks import logits_in_chunks
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.config import GemmaConfig

_METHOD = 2  # raised when results kept from an interrupted export would be of another kind
# Rows that a model writes. A matrix of more inputs needs more tokens; a larger model takes longer
# for each, and gets as many as take about as long as all of a Gemma 3 270M.
_FEWEST_ROWS, _MOST_ROWS = 36, 160
_TOKENS_FOR_AN_INPUT = 20
_MATRICES_OF_270M = 100e6
_MEASURED_LENGTH = 128  # tokens whose states are carried for every group at once
_MOST_TRIES = 5
_SAFETY = 0.97
_NEAR = 0.8  # of the budget: near enough not to look for a smaller plan


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The weights as they are to be rounded, and what is rounded already.

    Attributes:
        weights: canonical name to float array.
        rounded: a weight as integers, by name and format; `None` for what is rounded to nearest.
        text: what it was calibrated on, if it was.
        summary: what was done, for people and for the bundle.
        workspace: where what takes minutes is kept until the export is done.
    """

    weights: Mapping[str, np.ndarray]
    rounded: Callable[[str, Format], Quantized | None] = lambda name, fmt: None
    text: CalibrationText | None = None
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    workspace: Workspace = dataclasses.field(default_factory=lambda: Workspace(None, ""))


def round_weights(
    checkpoint: Checkpoint,
    plan: Plan,
    kept: KeptWeights,
    text: CalibrationSource,
    folder: Path,
    on_progress: Progress,
    rows: CalibrationText | None = None,
) -> Rounding:
    """Calibrate: balance activations, and round matrices of few bits with error feedback.

    Args:
        checkpoint: the model.
        plan: canonical name to format.
        kept: what the source holds on a grid already and stays as it is.
        text: what to calibrate on.
        folder: where results are kept until the export is done.
        on_progress: called with (stage, share of it that is done).
        rows: of `text`, if they have been read already, as those of a text file are.

    Raises:
        ExportRequestError: the text cannot be used.
    """
    config = checkpoint.config
    if text == OwnPage():  # a page is soon read again; what takes minutes is kept
        workspace = Workspace(None, "")
    else:
        on_progress("fingerprint", 0)
        key = fingerprint(config, checkpoint.weights, _METHOD, identity(text), plan_to_json(plan))
        workspace = Workspace(folder, key)
    chosen = rows or _calibration_text(checkpoint, text, workspace, folder, on_progress)
    on_progress("calibration", 0)
    calibrated = calibrate(
        config,
        checkpoint.weights,
        chosen.rows,
        plan,
        workspace,
        kept.formats.keys(),
        lambda done, total: on_progress("calibration", done / total),
    )
    summary = {"text": chosen.origin, "calibrated_on_tokens": int(chosen.rows.size)}

    def rounded(name: str, fmt: Format) -> Quantized | None:
        found = kept.matrix(name, fmt)
        return calibrated.rounded(name, fmt) if found is None else found

    return Rounding(calibrated.weights, rounded, chosen, summary, workspace)


def round_within(
    budget: float,
    draft: BundleDraft,
    rounding: Rounding,
    plan: Plan,
    keep: Collection[str],
    on_progress: Progress,
) -> Rounding:
    """Store the smallest mix of the planned formats and 8 bits that stays within a budget.

    What each matrix loses alone is measured once; what a mix loses together is measured on its
    own graph, and the prediction corrected by it.

    Args:
        budget: mean KL divergence from the float model on the held-out text, in nats.
        draft: to store into.
        rounding: calibrated or not.
        plan: the formats it would like to keep.
        keep: matrices that keep them whatever they lose.
        on_progress: called with (stage, share of it that is done).

    Raises:
        ExportRequestError: not even 8 bits everywhere stay within it.
    """
    checkpoint = draft.checkpoint
    config, exact = checkpoint.config, checkpoint.weights
    text = rounding.text or page(open_tokenizer(checkpoint), config.context_length)
    positions = text.positions

    def rounded(name: str, fmt: Format) -> Quantized:
        found = rounding.rounded(name, fmt)
        return search_scales(rounding.weights[name].T, fmt) if found is None else found

    def stored(name: str, fmt: Format) -> Quantized | None:
        in_groups = name.startswith("layers.") and fmt.bits < 8
        return rounded(name, fmt) if in_groups else rounding.rounded(name, fmt)

    groups = group_members(config, plan, keep)
    # Short rows: many texts matter more here than long ones.
    short = text.held_out[:, : min(_MEASURED_LENGTH, text.held_out.shape[1])]
    losses = _kept_losses(rounding.workspace, groups)
    if losses is None:
        on_progress("sensitivity", 0)
        losses = sensitivities(
            config,
            rounding.weights,
            plan,
            rounded,
            groups,
            short,
            np.arange(short.shape[1] // 2, short.shape[1], 4),
            lambda done, total: on_progress("sensitivity", done / total),
        )
        _keep_losses(rounding.workspace, losses)
    on_progress("reference", 0)
    reference = reference_logits(
        config,
        exact,
        text.held_out,
        positions,
        lambda done, total: on_progress("reference", done / total),
    )

    def attempt(most: float) -> _Attempt:
        chosen = plan_within(config, plan, raised_plan(config), groups, losses, most)
        draft.store(rounding.weights, chosen, stored)
        on_progress("measuring", 0)
        found = logits_in_chunks(
            draft.folder,
            config,
            text.held_out,
            positions,
            lambda done, total: on_progress("measuring", done / total),
        )
        quality = compare_logits(reference, found, "on held-out text")
        return _Attempt(most, chosen, quality)

    tried = _search(attempt, budget, sum(losses.values()))
    final = tried[-1]
    if final.quality.mean_kl > budget:
        nearest = final.quality.mean_kl
        raise ExportRequestError(
            f"a mean KL of {budget:g} cannot be met: even with 8 bits everywhere the loss "
            f"is {nearest:.2g}; ask for --kl-budget {nearest * 1.1:.2g} or more, or use "
            "--recipe int8 or fp16"
        )
    summary = dict(rounding.summary) | {
        "kl_budget": budget,
        "held_out": {
            "tokens": int(text.held_out.size),
            "mean_kl": final.quality.mean_kl,
            "same_top_token": final.quality.same_top_token,
            "text": text.origin,
        },
        "losses": losses,
        "raised_to_8_bits": [
            group for group, names in groups.items() if final.plan[names[0]] != plan[names[0]]
        ],
        "tried": [{"predicted": t.predicted, "mean_kl": t.quality.mean_kl} for t in tried],
    }
    return dataclasses.replace(rounding, summary=summary)


def _keep_losses(workspace: Workspace, losses: Mapping[str, float]) -> None:
    arrays = {"groups": np.array(list(losses)), "losses": np.array(list(losses.values()))}
    workspace.save("losses", arrays)


def _kept_losses(workspace: Workspace, groups: Collection[str]) -> dict[str, float] | None:
    """What an export that did not end has found each group to lose, if it got that far."""
    kept = workspace.load("losses")
    if kept is None:
        return None
    losses = dict(zip(kept["groups"].tolist(), kept["losses"].tolist(), strict=True))
    return losses if set(losses) == set(groups) else None


@dataclasses.dataclass(frozen=True)
class _Attempt:
    predicted: float
    plan: Mapping[str, Format]
    quality: Quality


def _search(attempt: Callable[[float], _Attempt], budget: float, total: float) -> list[_Attempt]:
    """Find the largest predicted loss whose measured loss is within a budget, or nearly.

    Returns:
        The attempts; the last is the best, and was stored last. It is over the budget only if
        nothing is within.
    """
    tried: list[_Attempt] = []
    within, beyond = 0.0, total  # predictions known, or hoped, to be on either side
    most = min(budget, total)
    while len(tried) < _MOST_TRIES:
        tried.append(attempt(most))
        kl = tried[-1].quality.mean_kl
        if kl <= budget:
            within = most
            if most == total or kl >= _NEAR * budget:
                return tried
        elif most == 0:
            return tried
        else:
            beyond = most
        wanted = most * _SAFETY * budget / max(kl, 1e-12)
        if kl <= budget and beyond == total and wanted >= total:
            most = total
            continue
        most = min(max(wanted, within), beyond)
        if most <= within or beyond - within < 0.05 * beyond:
            break
    if tried[-1].predicted != within:  # the best that was found has to be the one that is stored
        tried.append(attempt(within))
    return tried


def _calibration_text(
    checkpoint: Checkpoint,
    text: CalibrationSource,
    workspace: Workspace,
    folder: Path,
    on_progress: Progress,
) -> CalibrationText:
    config, tokenizer = checkpoint.config, open_tokenizer(checkpoint)
    if text == OwnPage():
        return page(tokenizer, config.context_length)
    if isinstance(text, TextFile):
        return text_file(text.path, tokenizer, config.context_length)
    length = min(ROW_LENGTH, config.context_length)
    needed, free = memory_needed(config, length), free_memory()
    if config.hidden_dim % BLOCK_SIZES[0] or (free is not None and needed > free):
        return page(tokenizer, config.context_length)
    on_progress("self-sampling", 0)
    batches: list[np.ndarray] = []
    while (kept := workspace.load(f"text.{len(batches)}")) is not None:
        batches.append(kept["ids"])
    rows = self_written_rows(config)
    for ids in self_sample(
        config,
        checkpoint.weights,
        tokenizer.bos_id(),
        (rows, length),
        seed=0,
        folder=folder,
        on_progress=lambda done, total: on_progress("self-sampling", done / total),
        first=len(batches),
    ):
        workspace.save(f"text.{len(batches)}", {"ids": ids})
        batches.append(ids)
    return split_rows(np.concatenate(batches), "text that the model wrote itself")


def self_written_rows(config: GemmaConfig) -> int:
    """How many rows a model writes to be calibrated on."""
    shapes = [spec.shape for spec in weight_specs(config).values() if spec.kind == "matrix"]
    wanted = _TOKENS_FOR_AN_INPUT * max(shape[0] for shape in shapes) / ROW_LENGTH
    affordable = _MOST_ROWS * _MATRICES_OF_270M / sum(map(math.prod, shapes))
    return int(min(max(min(wanted, affordable), _FEWEST_ROWS), _MOST_ROWS))
