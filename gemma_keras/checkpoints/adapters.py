"""Adapters of every format, found where they lie and merged into their bases."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError, ModelError

PEFT_CONFIG = "adapter_config.json"
_BESIDE = (
    "the adapter was merged into the weights in its own folder; if they have it already, take "
    f"{PEFT_CONFIG} away"
)
_HOW = "give its base (--base SOURCE, or base=...)"


Source = str | os.PathLike[str]


class Adapter(Protocol):
    """A LoRA on disk."""

    def merged(self, base: Source | None, open_base: Callable[[Source], Checkpoint]) -> Checkpoint:
        """The adapter merged into its base.

        Args:
            base: what it is for; by default what it says itself.
            open_base: opens that.

        Raises:
            CheckpointError: the base cannot be opened, or the adapter is not for it.
        """
        ...


def folder_with_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, alone or beside a model."""
    return (path / PEFT_CONFIG).is_file()


def find_adapter(path: Path) -> Adapter | None:
    """The adapter at that path, or `None`.

    Raises:
        CheckpointError: it is one that cannot be merged.
    """
    if folder_with_adapter(path):
        return _PeftFolder(path)
    if path.is_file():
        from gemma_keras.checkpoints.gguf_adapter import open_gguf_adapter

        return open_gguf_adapter(path)
    return None


@dataclasses.dataclass(frozen=True)
class _PeftFolder:
    """A folder that PEFT wrote, with its base beside the adapter or without."""

    folder: Path

    def merged(self, base: Source | None, open_base: Callable[[Source], Checkpoint]) -> Checkpoint:
        from gemma_keras.checkpoints.peft import merge, open_adapter
        from gemma_keras.checkpoints.safetensors import holds_model, read_safetensors_folder

        adapter = open_adapter(self.folder)
        if base is None and holds_model(self.folder):
            merged = merge(adapter, read_safetensors_folder(self.folder, adapter_is_read=True))
            return dataclasses.replace(merged, remarks=(*merged.remarks, _BESIDE))
        return merge(adapter, open_base_of(self.folder, base or adapter.base, open_base))


def open_base_of(
    adapter: Path, base: Source | None, open_base: Callable[[Source], Checkpoint]
) -> Checkpoint:
    """The base of an adapter; what is wrong with it is told as the base's.

    Raises:
        CheckpointError: it is not known, or cannot be opened.
    """
    if base is None:
        raise CheckpointError(f"{adapter} is an adapter and does not say of what; {_HOW}")
    try:
        return open_base(base)
    except ModelError as error:
        raise CheckpointError(
            f"{adapter} is an adapter of {base}, which cannot be opened: {error}; {_HOW}"
        ) from error
