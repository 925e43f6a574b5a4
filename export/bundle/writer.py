"""Writes a bundle: a folder that gets its final name only when it is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from edge_demo.bundle.manifest import (
    EMBEDDER,
    EMBEDDER_VERSION,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    EmbedderSpec,
    EmbeddingSpec,
    GraphSpec,
    RopeSpec,
    WindowSpec,
)
from edge_demo.durable import whole_or_nothing
from export.bundle.card import write_card
from export.bundle.terms import terms_of
from export.errors import ExportError, ExportRequestError
from export.formats.formats import Plan, plan_to_json
from export.formats.projections import projection_count
from export.formats.targets import ANY
from export.graph.contract import WEIGHTS_FILE
from gemma_keras.checkpoints.adapters.write import PeftFiles
from gemma_keras.checkpoints.names import parameter_count
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.text.chat import turn_ids

ADAPTERS_FOLDER = "adapters"
TOKENIZER_FILE = "tokenizer.model"
NOTICE_FILE = "GEMMA_NOTICE.txt"
_NOTICE = """\
{terms.subject} is provided under and subject to the {terms.title} found at {terms.url}

This folder holds a Model Derivative of {terms.subject}: the weights of {name}, converted to ONNX
and stored as {recipe} by gemma-keras. Whoever passes it on has to pass on this notice and the Terms
of Use with it, and may use it only as the {terms.policy} allows
({terms.policy_url}).
"""


@contextlib.contextmanager
def unfinished_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Makes a new folder beside `out`, which is renamed to `out` if the block succeeds, and removed
    otherwise.

    Files in a replaced bundle that do not belong to the bundle are moved into the new one.

    Raises:
        ExportRequestError: `out` exists and must not be overwritten, or is not a bundle.
    """

    def check() -> None:
        check_out(out, overwrite=overwrite)

    with whole_or_nothing(out, "folder", check, _not_the_bundles) as folder:
        yield folder


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise an error if the output path is not usable.

    Raises:
        ExportRequestError: it exists and must not be overwritten, or is not a bundle, or its parent
            is not a folder.
    """
    if not (out.exists() or out.is_symlink()):
        parent = next(p for p in out.parents if p.exists())
        if not parent.is_dir():
            raise ExportRequestError(f"{parent} is not a folder, so {out} cannot be made in it")
        return
    if not overwrite:
        raise ExportRequestError(f"{out} already exists; choose another folder, or add --overwrite")
    if not _is_bundle(out):
        raise ExportRequestError(
            f"{out} is not a bundle, so it will not be overwritten; move it away or choose "
            "another folder"
        )


def _is_bundle(folder: Path) -> bool:
    return _manifest_of(folder) is not None


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """Returns its manifest if it is a bundle's; another program may use the same file name."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return manifest if ours else None


def _not_the_bundles(folder: Path) -> list[str]:
    """Returns the names in a bundle's folder that its manifest does not list, such as the user's
    notes or `.git`. The folder of adapters is one of them if anything in it is not listed."""
    manifest = _manifest_of(folder) or {}
    files = manifest.get("files")
    own = {MANIFEST, *(files if isinstance(files, dict) else ())}
    if _has_only(folder / ADAPTERS_FOLDER, manifest.get(ADAPTERS_FOLDER)):
        own.add(ADAPTERS_FOLDER)
    return sorted(path.name for path in folder.iterdir() if path.name not in own)


def _has_only(folder: Path, adapters: Any) -> bool:
    """Whether a folder of adapters has no file beside those that a manifest lists."""
    if not isinstance(adapters, dict):
        return False
    listed = {
        folder / name / file
        for name, files in adapters.items()
        for file in (files if isinstance(files, dict) else ())
    }
    return all(
        path in listed or (path.is_dir() and not path.is_symlink()) for path in folder.rglob("*")
    )


def write_adapters(folder: Path, adapters: Mapping[str, PeftFiles]) -> dict[str, Any]:
    """Write adapters that stay apart from the model, a folder of PEFT's for each.

    Args:
        folder: of the bundle.
        adapters: name to files.

    Returns:
        The manifest's entry: name to the adapter's files with their sizes and hashes.
    """
    entry = {}
    for name, files in adapters.items():
        of_one = folder / ADAPTERS_FOLDER / name
        of_one.mkdir(parents=True)
        files.write(of_one)
        entry[name] = _files(of_one)
    return entry


def open_tokenizer(checkpoint: Checkpoint) -> sentencepiece.SentencePieceProcessor:
    """The checkpoint's SentencePiece model, checked.

    Raises:
        ExportError: the checkpoint has none, or it does not fit the model.
    """
    if not checkpoint.tokenizer_model:
        raise ExportError(
            "the checkpoint has no tokenizer, and a bundle needs one; copy the model's "
            "tokenizer.model or tokenizer.json into its folder"
        )
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=checkpoint.tokenizer_model)
    except Exception as error:  # sentencepiece raises RuntimeError or its own, by version
        raise ExportError(f"tokenizer.model is not a SentencePiece model: {error}") from error
    if min(model.bos_id(), model.eos_id()) < 0:
        raise ExportError(
            "tokenizer.model lacks the beginning-of-sequence or the end-of-sequence token, "
            "which Gemma's tokenizer has"
        )
    if model.vocab_size() > checkpoint.config.vocabulary_size:
        raise ExportError(
            f"the tokenizer has {model.vocab_size():,} tokens, but the model's vocabulary "
            f"has {checkpoint.config.vocabulary_size:,}"
        )
    return model


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Write the SentencePiece model; returns the manifest's entry about it.

    Raises:
        ExportError: the checkpoint has none, or it does not fit the model.
    """
    model = open_tokenizer(checkpoint)
    assert checkpoint.tokenizer_model is not None
    (folder / TOKENIZER_FILE).write_bytes(checkpoint.tokenizer_model)
    chat = None
    try:
        stop = checkpoint.stop_ids()
        if checkpoint.instruction_tuned:
            turns = checkpoint.turns
            start, end = turn_ids(checkpoint.tokenizer_model, turns)
            chat = dataclasses.asdict(turns) | {"start_of_turn": start, "end_of_turn": end}
    except ValueError as error:
        raise ExportError(str(error)) from None
    return {"file": TOKENIZER_FILE, "bos": model.bos_id(), "stop": list(stop), "chat": chat}


def write_notices(folder: Path, checkpoint: Checkpoint, recipe: str) -> dict[str, Any]:
    """Write the Gemma notice and those that came with the weights; returns the manifest's entry."""
    name = checkpoint.provenance.get("name", "a Gemma model")
    terms = terms_of(checkpoint.provenance, checkpoint.config, checkpoint.instruction_tuned)
    text = _NOTICE.format(terms=terms, name=name, recipe=recipe)
    (folder / NOTICE_FILE).write_text(text, encoding="utf-8")
    for file, content in checkpoint.notices.items():
        (folder / file).write_bytes(content)
    return {"name": checkpoint.provenance.get("license", "gemma"), "notice": NOTICE_FILE}


def write_manifest(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: str,
    target: str,
    lowering: str,
    plan: Plan,
    graphs: Mapping[str, GraphSpec],
    embedding: EmbeddingSpec,
    ropes: Iterable[RopeSpec],
    windows: Iterable[WindowSpec],
    tokenizer: Mapping[str, Any],
    licence: Mapping[str, Any],
    max_context: int,
    report: Mapping[str, Any],
    adapters: Mapping[str, Any],
    embedder: EmbedderSpec | None = None,
) -> None:
    """Write the model card, and `bundle.json` about the files that are then in the folder.

    Args:
        report: `quality` and `rounding` for the manifest, as far as they are known, and more for
            the card; see `export.bundle.card.write_card`.
        adapters: what `write_adapters` returned.
        embedder: what a bundle says that embeds texts.
    """
    config = checkpoint.config
    of_kind: dict[str, Any] = {}
    projections = 0
    if embedder is not None:
        of_kind = {"kind": EMBEDDER, "embedder": dataclasses.asdict(embedder)}
        projections = projection_count(embedder.projections)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if embedder is None else EMBEDDER_VERSION,
        **of_kind,
        "model": {
            "name": checkpoint.provenance.get("name", "Gemma"),
            "parameters": parameter_count(config) + projections,
            "vocabulary_size": config.vocabulary_size,
            "context_length": max_context,
            "config": config.to_dict(),
        },
        "recipe": recipe,
        **({} if target == ANY else {"target": target}),
        "lowering": lowering,
        "plan": plan_to_json(plan),
        "weights": WEIGHTS_FILE,
        "graphs": {name: dataclasses.asdict(graph) for name, graph in graphs.items()},
        "embedding": {
            k: v for k, v in dataclasses.asdict(embedding).items() if v or k != "by_rows"
        },
        "ropes": [dataclasses.asdict(rope) for rope in ropes],
        "windows": [dataclasses.asdict(window) for window in windows],
        "tokenizer": dict(tokenizer),
        "provenance": checkpoint.provenance,
        "license": dict(licence),
        "quality": report.get("quality"),
        "rounding": report.get("rounding"),
    }
    write_card(folder, manifest, report)  # first: it is one of the files
    manifest["files"] = _files(folder)
    if adapters:
        manifest[ADAPTERS_FOLDER] = dict(adapters)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _files(folder: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files
