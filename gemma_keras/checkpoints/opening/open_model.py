"""Opens a source of any kind; the caller supplies the function that opens Keras presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from gemma_keras.checkpoints.adapters.base import Source
from gemma_keras.checkpoints.adapters.read import norm_means, read_adapter
from gemma_keras.checkpoints.hub import hf_name, preset_name
from gemma_keras.checkpoints.low_rank import Adapter
from gemma_keras.checkpoints.opening.classify import Classified, Kind, classify
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError

OpenWithKeras = Callable[[Classified], Checkpoint]


def open_model(
    source: Source,
    base: Source | None,
    instruction_tuned: bool | None,
    open_with_keras: OpenWithKeras,
) -> Checkpoint:
    """As `gemma_keras.open_checkpoint`.

    Args:
        source: what to open.
        base: the base model of an adapter; by default the one that the adapter names.
        instruction_tuned: whether it follows a turn template; by default as its chat template says.
        open_with_keras: opens a preset.

    Raises:
        CheckpointError: the source does not exist, or cannot be read.
        ConfigError: it is not a Gemma.
    """
    checkpoint = _open(classify(source), base, open_with_keras)
    if instruction_tuned is None:
        return checkpoint
    return dataclasses.replace(checkpoint, instruction_tuned=instruction_tuned)


class Apart(NamedTuple):
    """A base model, and adapters that are not merged into it.

    Attributes:
        base: the model without them.
        adapters: by name; none for a model without one.
    """

    base: Checkpoint
    adapters: Mapping[str, Adapter]


def open_apart(source: Source, base: Source | None, open_with_keras: OpenWithKeras) -> Apart:
    """Open an adapter's base and the adapter, which has the name of its folder or file.

    Args:
        source: what to open.
        base: the base model of an adapter; by default the one that the adapter names.
        open_with_keras: opens a preset.

    Raises:
        CheckpointError: either cannot be read, the adapter is for another base, or it changes more
            than matrices of the blocks.
        ConfigError: the base is not a Gemma.
    """
    classified = classify(source)
    if classified.kind is Kind.SAMPLE_CHAT and base is None:
        from gemma_keras.checkpoints.opening.sample import sample_chat_apart

        checkpoint, path = sample_chat_apart()
        name = str(source)
    elif classified.adapter is None:
        return Apart(_open(classified, base, open_with_keras), {})
    else:
        assert classified.path is not None  # of an adapter
        path = classified.path
        checkpoint = classified.adapter.base_alone(
            base, lambda given: _open_base(given, open_with_keras)
        )
        name = path.resolve().stem if path.is_file() else path.resolve().name
        if not Path(source).exists():
            name = str(hf_name(source)).split("/")[1]  # the folder in the cache has a commit's
    found = read_adapter(path, checkpoint.config)
    norms = norm_means(checkpoint.config, checkpoint.weights)
    found.check_base(norms, "name the base that it was trained on")
    return Apart(checkpoint, {name: found.adapter()})


def _open(
    classified: Classified, base: Source | None, open_with_keras: OpenWithKeras
) -> Checkpoint:
    if classified.adapter is not None:
        return classified.adapter.merged(base, lambda source: _open_base(source, open_with_keras))
    if base is not None:
        raise CheckpointError(
            f"{classified.source} is a complete model and not an adapter, so it takes no "
            f"base model; remove {base}"
        )
    return _open_whole(classified, open_with_keras)


def _open_base(base: Source, open_with_keras: OpenWithKeras) -> Checkpoint:
    classified = classify(base)
    if classified.kind is Kind.ADAPTER:
        raise CheckpointError(f"{base} is itself an adapter; merge it into its base model first")
    return _open_whole(classified, open_with_keras)


def _open_whole(classified: Classified, open_with_keras: OpenWithKeras) -> Checkpoint:
    """Open a source that is not an adapter."""
    source, path = classified.source, classified.path
    if classified.kind is Kind.SAMPLE:
        from gemma_keras.checkpoints.opening.sample import open_sample

        return open_sample()
    if classified.kind is Kind.SAMPLE_CHAT:
        from gemma_keras.checkpoints.opening.sample import open_sample_chat

        return open_sample_chat()
    if classified.kind is Kind.KERAS_HUB_PRESET:
        name = preset_name(source)
        origin = {"file": name} if Path(source).exists() else {"preset": name}
        return _with(open_with_keras(classified), name=name, **origin)
    if classified.kind is Kind.OWN_PRESET:
        return open_with_keras(classified)
    assert path is not None  # of what lies somewhere
    if classified.kind is Kind.GGUF_FILE:
        from gemma_keras.checkpoints.gguf.reader import read_gguf

        return read_gguf(path)
    from gemma_keras.checkpoints.hf.reader import read_safetensors_folder

    checkpoint = read_safetensors_folder(path)
    if Path(source).exists():
        return checkpoint
    repository = str(hf_name(source))  # the folder in the cache has a commit for its name
    name = repository.split("/")[1]
    return _with(checkpoint, file=repository, name=name, repository=repository)


def _with(checkpoint: Checkpoint, **provenance: str) -> Checkpoint:
    return dataclasses.replace(checkpoint, provenance=checkpoint.provenance | provenance)
