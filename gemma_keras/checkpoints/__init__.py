"""Files of checkpoints, of every format: what `gemma_keras.open_checkpoint` reads."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`open_checkpoint`, which was here before; it is `gemma_keras.open_checkpoint`."""
    if name != "open_checkpoint":
        raise AttributeError(f"module 'gemma_keras.checkpoints' has no attribute {name!r}")
    from gemma_keras.open import open_checkpoint

    return open_checkpoint
