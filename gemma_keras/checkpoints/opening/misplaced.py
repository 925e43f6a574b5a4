"""Explains paths that are almost a checkpoint, and says what to give instead."""

from __future__ import annotations

import re
from pathlib import Path

from gemma_keras.checkpoints.adapters.base import folder_with_adapter
from gemma_keras.checkpoints.first_bytes import explain_pointer

_TRAINER = re.compile(r"checkpoint-(\d+)")
_IN_A_FOLDER = ("config.json", "adapter_config.json", "tokenizer.model", "tokenizer.json")
_KINDS = {
    ".safetensors": "holds weights without their configuration; give the folder {folder} instead",
    ".json": "is one file of a checkpoint; give the folder {folder} instead",
    ".model": "is a tokenizer without a model; give the model's folder",
    ".keras": "is a saved Keras model; load it with keras.saving.load_model and export that model: "
    'model.export(FOLDER, format="onnx")',
    ".h5": "holds weights without their configuration; load them into a model of the same "
    'architecture and export that model: model.export(FOLDER, format="onnx")',
    ".onnx": "is already an ONNX graph; give the checkpoint that it was made from",
    ".task": "is a MediaPipe bundle, which cannot be read back; give the checkpoint "
    "that it was made from",
    ".tflite": "is a LiteRT graph, which cannot be read back; give the checkpoint "
    "that it was made from",
    ".litertlm": "is a LiteRT graph, which cannot be read back; give the checkpoint "
    "that it was made from",
    ".zip": "is an archive; extract it and give the folder",
    ".gz": "is an archive; extract it and give the folder",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_LISTED = 10_000  # maximum number of a folder's entries that are checked


def explain_file(path: Path) -> str | None:
    """Explains a file that is not GGUF; `None` if it is not recognized."""
    if what := explain_pointer(path):
        return what
    if path.name == "bundle.json":
        return _explain_bundle(path.parent)
    kind = path.suffix.lower()
    if kind in _PICKLES:
        return (
            f"{path} is a pickle, which is not read because it can run arbitrary code; give "
            "a folder with config.json and safetensors"
        )
    if kind in _KINDS and (kind != ".json" or path.name in _IN_A_FOLDER or "index" in path.name):
        return f"{path} {_KINDS[kind].format(folder=path.parent)}"
    return None


def explain_folder(folder: Path) -> str | None:
    """Explains a folder without a checkpoint; `None` if it may be a checkpoint."""
    if (folder / "bundle.json").exists() and not any(folder.glob("*.safetensors")):
        return _explain_bundle(folder)
    if (folder / "config.json").exists():
        return None
    if (folder / "snapshots").is_dir():
        return _explain_inner(folder, "is an entry of the Hugging Face Hub's cache", "snapshots/*")
    if (folder / "zero_to_fp32.py").exists():
        return (
            f"{folder} holds a DeepSpeed checkpoint; convert it with: python "
            "zero_to_fp32.py . . --safe_serialization"
        )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"{folder} holds GGUF files; give one of them, such as {folder / ggufs[0]}"
    if message := _explain_inner(
        folder, "holds folders of checkpoints, but is not a checkpoint itself", "*"
    ):
        return message
    if any(folder.glob("*.safetensors")):
        return (
            f"{folder} holds weights but no config.json; put the model's config.json into the "
            "folder"
        )
    if (folder / "tokenizer.model").exists() or (folder / "tokenizer.json").exists():
        return f"{folder} holds a tokenizer but no model: config.json and safetensors are missing"
    return None


def _explain_bundle(folder: Path) -> str:
    return (
        f"{folder} is a bundle that export-onnx made; run it with edge-demo (edge-demo chat "
        f"{folder}), or give the checkpoint that it was made from"
    )


def _explain_inner(folder: Path, what: str, pattern: str) -> str | None:
    """Name the newest checkpoint in a folder of checkpoints: by number, else by time."""
    inner = []
    for number, path in enumerate(folder.glob(pattern)):
        if number > _MOST_LISTED:
            break
        if (path / "config.json").is_file() or folder_with_adapter(path):
            inner.append(path)
    if not inner:
        return None
    newest = max(inner, key=_age)
    return f"{folder} {what}; give one of them, such as {newest}, the newest"


def _age(path: Path) -> tuple[int, float, str]:
    match = _TRAINER.fullmatch(path.name)
    return (int(match[1]) if match else -1, path.stat().st_mtime, path.name)
