"""Finds checkpoints by name on the Hugging Face Hub or among KerasHub's presets."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from gemma_keras.errors import CheckpointError

_HF_NAME = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)")
_HF_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "LICENSE*",
    "NOTICE*",
]
_PRESET_NAME = re.compile(r"kaggle://.+|[a-z]*gemma[\w.]*")
_KERAS_HUB_CLASSES = ("GemmaBackbone", "Gemma3Backbone")
_MAX_JSON = 16 << 20


def hf_name(source: str | os.PathLike[str]) -> str | None:
    """The repository that `org/name` or `hf://org/name` means; `None` for anything else."""
    match = _HF_NAME.fullmatch(os.fspath(source))
    return match[1] if match else None


def download(name: str) -> Path:
    """A repository of the Hugging Face Hub as a folder, from its cache if it is there.

    Files that may contain code, such as pickles, are not downloaded.

    Raises:
        CheckpointError: it does not exist, its terms were not accepted, or there is no network.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{name} is not a local file; to find it on the Hugging Face Hub, run: pip "
            "install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=_HF_FILES))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not a local file, and the Hugging Face Hub cannot be reached"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} cannot be downloaded from the Hugging Face Hub ({reason}); for a gated "
            "model, accept its terms there and run: hf auth login"
        ) from error


def local_or_downloaded(source: str | os.PathLike[str], wanted: str) -> Path:
    """The file or folder of that path, or the folder of that repository.

    Args:
        source: a path, or a name on the Hugging Face Hub.
        wanted: valid sources, for the error message after "give".

    Raises:
        CheckpointError: it is neither, or cannot be downloaded.
    """
    path = Path(source)
    if path.exists():
        return path
    name = hf_name(source)
    if name is None:
        raise CheckpointError(f"{path} does not exist; give {wanted}")
    return download(name)


def opens_with_keras(source: str | os.PathLike[str]) -> bool:
    """Whether opening it starts Keras, which may take seconds: files that Keras wrote, and possible
    preset names."""
    path = Path(source)
    if path.exists():
        return path.is_dir() and bool(_registered_name(path))
    return bool(_PRESET_NAME.fullmatch(str(source)))


def is_keras_hub_preset(source: str | os.PathLike[str]) -> bool:
    """Whether it is one of KerasHub's own Gemma presets: a folder that KerasHub wrote, one of its
    names, or a `kaggle://` address."""
    path = Path(source)
    if path.exists():
        return path.is_dir() and _registered_name(path).startswith("keras_hub>")
    if not opens_with_keras(source):
        return False
    if str(source).startswith("kaggle://"):
        return True
    import keras_hub

    return any(source in getattr(keras_hub.models, name).presets for name in _KERAS_HUB_CLASSES)


def preset_name(source: str | os.PathLike[str]) -> str:
    """The name of a preset, without the path or the `kaggle://` address and version around it."""
    *before, last = os.fspath(source).rstrip("/").split("/")
    return before[-1] if before and last.isdigit() else last


def load_keras_hub_preset(source: str | os.PathLike[str]):
    """KerasHub's model of one of its presets.

    Raises:
        CheckpointError: KerasHub cannot load it.
    """
    import keras_hub

    try:
        return keras_hub.models.CausalLM.from_preset(str(source))
    except KeyError as error:
        raise CheckpointError(f"the KerasHub preset {source} lacks {error}") from error
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"KerasHub cannot load the preset {source}: {error}") from error


def is_own_preset(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that `GemmaCausalLM.save_to_preset` wrote."""
    # It holds a config.json too, as a Hugging Face folder does; task.json only KerasHub writes.
    path = Path(path)
    return (path / "task.json").exists() and not is_keras_hub_preset(path)


def is_text_embedder_preset(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that `GemmaTextEmbedder.save_to_preset` wrote."""
    return _registered_name(Path(path), "task.json") == "gemma_keras>GemmaTextEmbedder"


def _registered_name(folder: Path, file: str = "config.json") -> str:
    """Returns the class that one of Keras's files names; empty if it names no class."""
    path = folder / file
    try:
        if path.stat().st_size > _MAX_JSON:
            return ""
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    name = content.get("registered_name") if isinstance(content, dict) else None
    return name if isinstance(name, str) else ""
