"""Decides what kind of source was given, once, before anything is read."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

from gemma_keras.checkpoints.adapters.base import Adapter, Source
from gemma_keras.checkpoints.adapters.find import find_adapter
from gemma_keras.checkpoints.first_bytes import begins_as_gguf
from gemma_keras.checkpoints.hub import is_keras_hub_preset, is_own_preset, local_or_downloaded
from gemma_keras.checkpoints.opening.misplaced import explain_file, explain_folder
from gemma_keras.errors import CheckpointError

_SOURCES = (
    "a .gguf file, a folder with config.json, the name of a model on the Hugging Face Hub or of a "
    "KerasHub preset, 'sample', or 'sample-chat'"
)


class Kind(enum.Enum):
    """The kinds of sources that can be opened."""

    SAMPLE = "the sample model of a package"
    SAMPLE_CHAT = "the sample model, taught to answer in turns"
    KERAS_HUB_PRESET = "a KerasHub preset, by name or as a folder"
    OWN_PRESET = "a folder that `GemmaCausalLM.save_to_preset` wrote"
    ADAPTER = "a LoRA adapter, alone or beside its base"
    HF_FOLDER = "a folder with config.json and safetensors"
    GGUF_FILE = "a GGUF file"


@dataclasses.dataclass(frozen=True)
class Classified:
    """A source and its kind.

    Attributes:
        source: as it was given.
        kind: its kind.
        path: local path, downloaded if necessary; `None` for a source without a path.
        adapter: the opened adapter, if the kind is `Kind.ADAPTER`.
    """

    source: Source
    kind: Kind
    path: Path | None = None
    adapter: Adapter | None = None


def classify(source: Source) -> Classified:
    """Classifies a source; a name on the Hugging Face Hub is downloaded.

    Raises:
        CheckpointError: it does not exist, or is of no supported kind; the message says what it is.
    """
    if source == "sample":
        return Classified(source, Kind.SAMPLE)
    if source == "sample-chat":
        return Classified(source, Kind.SAMPLE_CHAT)
    if is_keras_hub_preset(source):
        return Classified(source, Kind.KERAS_HUB_PRESET)
    path = local_or_downloaded(source, _SOURCES)
    adapter = find_adapter(path)
    if adapter is not None:
        return Classified(source, Kind.ADAPTER, path, adapter)
    if is_own_preset(path):
        return Classified(source, Kind.OWN_PRESET, path)
    if path.is_dir():
        kind, message = Kind.HF_FOLDER, explain_folder(path)
    else:
        kind, message = Kind.GGUF_FILE, None if begins_as_gguf(path) else explain_file(path)
    if message is not None:
        raise CheckpointError(message)
    return Classified(source, kind, path)
