"""The interface of adapters of all formats: they open their base model and merge into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError, ModelError

PEFT_CONFIG = "adapter_config.json"
_HOW = "name the base model (--base SOURCE, or base=...)"

Source = str | os.PathLike[str]


class Adapter(Protocol):
    """A LoRA on disk."""

    def merged(self, base: Source | None, open_base: Callable[[Source], Checkpoint]) -> Checkpoint:
        """Returns the base model with the adapter merged into it.

        Args:
            base: the base model; by default the one that the adapter names.
            open_base: opens the base model.

        Raises:
            CheckpointError: the base cannot be opened, or the adapter is not for it.
        """
        ...

    def base_alone(
        self, base: Source | None, open_base: Callable[[Source], Checkpoint]
    ) -> Checkpoint:
        """Returns the base model without the adapter; as `merged`."""
        ...


def folder_with_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, with or without a model."""
    return (path / PEFT_CONFIG).is_file()


def open_base_of(
    adapter: Path, base: Source | None, open_base: Callable[[Source], Checkpoint]
) -> Checkpoint:
    """Opens the base model of an adapter; errors say that they concern the base model.

    Raises:
        CheckpointError: the base model is unknown, or cannot be opened.
    """
    if base is None:
        raise CheckpointError(f"{adapter} is an adapter that does not name its base model; {_HOW}")
    try:
        return open_base(base)
    except ModelError as error:
        raise CheckpointError(
            f"{adapter} is an adapter for {base}, which cannot be opened: {error}; {_HOW}"
        ) from error
