"""The story of an export, from a checkpoint or a model to a bundle."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from edge_demo.bundle import Bundle
from export import bundle as writer
from export.contract import WEIGHTS_FILE, engine_contract, interchange_contract, ropes
from export.ecosystem import write_ecosystem_files
from export.errors import ExportError, ExportRequestError
from export.fused import build_graph
from export.quantize.formats import plan_bytes, plan_for_recipe, recipe_named
from export.start_keras import start_keras
from export.store import store_weights
from export.weights_file import WeightsFile
from gemma_keras.checkpoints import Checkpoint, open_checkpoint
from gemma_keras.checkpoints.names import parameter_count
from gemma_keras.config import GemmaConfig

if TYPE_CHECKING:
    from export.verify import Quality
    from gemma_keras.causal_lm import GemmaCausalLM

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        path: the bundle.
        recipe: how its weights are stored.
        num_bytes: of all its files.
        quality: how near it is to the model, or `None` if that was not asked.
    """

    path: Path
    recipe: str
    num_bytes: int
    quality: Quality | None


def export_onnx(
    source: str | os.PathLike[str] | GemmaCausalLM,
    out: str | os.PathLike[str],
    recipe: str = "int8",
    *,
    max_context: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    on_progress: Progress = lambda stage, share: None,
) -> ExportResult:
    """Write a bundle that `edge-demo` runs.

    Args:
        source: what `gemma_keras.open_checkpoint` takes, or a `GemmaCausalLM`.
        out: the folder to write; it gets this name only when it is complete.
        recipe: `int8` or `fp32`.
        max_context: the longest sequence the bundle is for, in tokens; the model's by default.
        overwrite: whether a bundle that stands there is replaced.
        verify: whether the bundle is run and compared with the Keras model.
        on_progress: told the stage and how much of it is done, 0 to 1.

    Raises:
        ExportRequestError: the recipe, the context or the output folder cannot be used.
        ModelError: the source cannot be used.
        ExportError: no space or memory, or the bundle differs from the model.
    """
    out = Path(os.path.realpath(out))  # a link to a bundle stays, what it points at is replaced
    with _told_in_a_sentence(out):
        writer.check_out(out, overwrite=overwrite)
    checkpoint, model = _open(source)
    config = checkpoint.config
    plan = plan_for_recipe(recipe, config)
    max_context = _check_context(max_context, config)
    _check_space(out, plan_bytes(plan, config))
    if verify and model is None:
        _check_memory(config)

    with _told_in_a_sentence(out), writer.unfinished_folder(out, overwrite=overwrite) as folder:
        tokenizer = writer.write_tokenizer(folder, checkpoint, config.vocabulary_size)
        licence = writer.write_notices(folder, checkpoint, recipe)
        write_ecosystem_files(folder, checkpoint, tokenizer, max_context)
        recipe_is_balanced = recipe_named(recipe).balanced
        if verify or recipe_is_balanced:
            on_progress("keras", 0)
            start_keras()
        source_weights = checkpoint.weights
        if recipe_is_balanced:
            source_weights = _balanced(checkpoint, on_progress)
        on_progress("weights", 0)
        with WeightsFile(folder / WEIGHTS_FILE) as weights:
            store_weights(
                config, source_weights, plan, weights, lambda d, n: on_progress("weights", d / n)
            )
        graphs = {"interchange": interchange_contract(config), "engine": engine_contract(config)}
        for number, contract in enumerate(graphs.values()):
            on_progress("graphs", number / len(graphs))
            graph = build_graph(config, plan, weights, contract, max_context)
            ir.save(graph, folder / contract.file)
            onnx.checker.check_model(str(folder / contract.file))
        on_progress("graphs", 1)

        def write_manifest(quality: Quality | None) -> None:
            writer.write_manifest(
                folder,
                checkpoint,
                recipe,
                plan,
                graphs,
                list(ropes(config).values()),
                tokenizer,
                licence,
                max_context,
                None if quality is None else dataclasses.asdict(quality),
            )

        write_manifest(None)
        quality = None
        if verify:
            on_progress("verification", 0)
            quality = _verify(folder, checkpoint, model, recipe)
            write_manifest(quality)
            on_progress("verification", 1)
        num_bytes = Bundle.open(folder).num_bytes
    return ExportResult(out, recipe, num_bytes, quality)


def _open(source) -> tuple[Checkpoint, GemmaCausalLM | None]:
    if isinstance(source, (str, os.PathLike)):
        return open_checkpoint(source), None
    return source.as_checkpoint(), source


def _balanced(checkpoint: Checkpoint, on_progress: Progress) -> Mapping[str, np.ndarray]:
    import sentencepiece

    from export.quantize.balance import BalancedWeights
    from export.quantize.calibrate import TEXT, channel_rms

    on_progress("calibration", 0)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model)
    ids = [tokenizer.bos_id(), *tokenizer.encode(TEXT.read_text(encoding="utf-8"))]
    config = checkpoint.config
    rms = channel_rms(
        config,
        checkpoint.weights,
        ids[: config.context_length],
        lambda done, total: on_progress("calibration", done / total),
    )
    return BalancedWeights(config, checkpoint.weights, rms)


def _verify(folder: Path, checkpoint: Checkpoint, model: GemmaCausalLM | None, recipe: str):
    from export.verify import verify
    from gemma_keras.causal_lm import GemmaCausalLM

    if model is None:
        model = GemmaCausalLM.from_checkpoint(
            dataclasses.replace(checkpoint, tokenizer_model=None), dtype="float32"
        )
    return verify(Bundle.open(folder), model, recipe)


def _check_context(max_context: int | None, config: GemmaConfig) -> int:
    if max_context is None:
        return config.context_length
    if not 1 <= max_context <= config.context_length:
        raise ExportRequestError(
            f"the model's context is {config.context_length:,} tokens; --max-context "
            f"{max_context:,} is outside 1 to that"
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


def _check_memory(config: GemmaConfig) -> None:
    """Refuse to build a Keras model that would drive the machine into swap."""
    needed = parameter_count(config) * 4 + 3 * 192 * config.vocabulary_size * 4
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return  # not Linux: nothing to compare with
    if needed > available:
        raise ExportError(
            f"verification builds the Keras model in float32, which needs about "
            f"{needed / 1e9:.1f} GB; {available / 1e9:.1f} GB are free. Use --no-verify"
        )


class _told_in_a_sentence:
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
