"""Finds adapters of all formats and merges them into their base models."""

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
    "the adapter was merged into the weights in the same folder; if these weights already "
    f"contain it, remove {PEFT_CONFIG}"
)


def find_adapter(path: Path) -> Adapter | None:
    """Returns the adapter at a path, or `None`.

    Raises:
        CheckpointError: the adapter cannot be merged.
    """
    if folder_with_adapter(path):
        return _PeftFolder(path)
    if path.is_file():
        from gemma_keras.checkpoints.adapters.gguf import open_gguf_adapter

        return open_gguf_adapter(path)
    return None


@dataclasses.dataclass(frozen=True)
class _PeftFolder:
    """Opens a folder that PEFT wrote, with or without the base model in it."""

    folder: Path

    def merged(self, base: Source | None, open_base: Callable[[Source], Checkpoint]) -> Checkpoint:
        from gemma_keras.checkpoints.adapters.peft import merge, open_adapter

        adapter = open_adapter(self.folder)
        merged = merge(adapter, self.base_alone(base, open_base))
        if self._holds_base(base):
            return dataclasses.replace(merged, remarks=(*merged.remarks, _BESIDE))
        return merged

    def base_alone(
        self, base: Source | None, open_base: Callable[[Source], Checkpoint]
    ) -> Checkpoint:
        from gemma_keras.checkpoints.adapters.peft import open_adapter
        from gemma_keras.checkpoints.hf.reader import read_safetensors_folder

        if self._holds_base(base):
            return read_safetensors_folder(self.folder, adapter_is_read=True)
        return open_base_of(self.folder, base or open_adapter(self.folder).base, open_base)

    def _holds_base(self, base: Source | None) -> bool:
        from gemma_keras.checkpoints.hf.reader import holds_model

        return base is None and holds_model(self.folder)
