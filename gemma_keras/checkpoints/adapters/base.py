"""What adapters of all formats have in common: a base, opened and merged into."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError, ModelError

PEFT_CONFIG = "adapter_config.json"
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
