"""Adapters of every format, found where they lie and merged into their bases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from gemma_keras.checkpoints.adapters.base import (
    PEFT_CONFIG,
    Adapter,
    Source,
    folder_with_adapter,
    open_base_of,
)
from gemma_keras.checkpoints.source import Checkpoint

_BESIDE = (
    "the adapter was merged into the weights in its own folder; if they have it already, take "
    f"{PEFT_CONFIG} away"
)


def find_adapter(path: Path) -> Adapter | None:
    """The adapter at that path, or `None`.

    Raises:
        CheckpointError: it is one that cannot be merged.
    """
    if folder_with_adapter(path):
        return _PeftFolder(path)
    if path.is_file():
        from gemma_keras.checkpoints.adapters.gguf import open_gguf_adapter

        return open_gguf_adapter(path)
    return None


@dataclasses.dataclass(frozen=True)
class _PeftFolder:
    """A folder that PEFT wrote, with its base beside the adapter or without."""

    folder: Path

    def merged(self, base: Source | None, open_base: Callable[[Source], Checkpoint]) -> Checkpoint:
        from gemma_keras.checkpoints.adapters.peft import merge, open_adapter
        from gemma_keras.checkpoints.hf.reader import holds_model, read_safetensors_folder

        adapter = open_adapter(self.folder)
        if base is None and holds_model(self.folder):
            merged = merge(adapter, read_safetensors_folder(self.folder, adapter_is_read=True))
            return dataclasses.replace(merged, remarks=(*merged.remarks, _BESIDE))
        return merge(adapter, open_base_of(self.folder, base or adapter.base, open_base))
