"""Reads and writes checkpoint files of all formats for `gemma_keras.open_checkpoint`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Keeps the old import of `open_checkpoint`, now `gemma_keras.open_checkpoint`."""
    if name != "open_checkpoint":
        raise AttributeError(f"module 'gemma_keras.checkpoints' has no attribute {name!r}")
    from gemma_keras.open import open_checkpoint

    return open_checkpoint
