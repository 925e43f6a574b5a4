"""Checks that a PEFT `adapter_config.json` describes an adapter that can be merged.

An adapter is a low-rank update of matrices, `W + scale * B @ A`. Keys about its training are
ignored. Keys that turn on another method must be off.

Source: PEFT 0.21 (`LoraConfig`, `LoraLayer.update_layer`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_keras.errors import CheckpointError, quoted

_INERT = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config
    megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_rslora
    """.split()  # noqa: SIM905 - as a list it would fill the screen
)
# Key to the feature that it turns on; all must be off.
_MUST_BE_OFF = {
    "alora_invocation_tokens": "an adapter that acts after certain tokens only (aLoRA)",
    "arrow_config": "a choice between adapters for each token (Arrow)",
    "bias": "biases, which Gemma's matrices do not have",
    "layer_replication": "layers used several times",
    "lora_bias": "biases, which Gemma's matrices do not have",
    "target_parameters": "updates of single parameters, not of matrices",
    "trainable_token_indices": "single rows of the embedding",
    "use_dora": "a length for each output (DoRA)",
    "use_qalora": "inputs in groups (QA-LoRA)",
}
_OFF = (None, False, "none", [], {}, "")
# With others the base model's matrices were changed before training, or the update is not a plain
# product.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
_LARGEST_ALPHA = 1e30
_MOST_PATTERNS = 5000  # EVA and the like write one for each matrix
_MOST_PATTERN = 200  # characters of one
# Nested repetitions can make a regular expression run practically forever.
_SLOW_PATTERN = re.compile(r"\)\s*[*+?{]|(?:[*+{].*){4}")


def check_adapter_config(path: Path, data: Mapping[str, Any]) -> None:
    """Raise an error for an adapter that is not a plain LoRA, and name the key.

    Args:
        path: of the file, for people.
        data: its content.

    Raises:
        CheckpointError: it is not a plain LoRA, or a value is not valid.
    """
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path} has the peft_type {quoted(kind)}; only LORA can be merged here. Merge "
            "the adapter with PEFT (merge_and_unload) and give the merged folder"
        )
    for key, value in data.items():
        if value in _OFF or key in _INERT or key.startswith(("_", "unsloth_")):
            continue
        asked = _MUST_BE_OFF.get(key, "a feature that this project does not support")
        raise CheckpointError(
            f"{path} has {key[:80]}={quoted(value)}, which requires {asked}; merge it with "
            "PEFT (merge_and_unload) and give the merged folder"
        )
    saved = data.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise CheckpointError(
            f"{path} must have a list of names as modules_to_save, found {quoted(saved)}"
        )
    beginning = data.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        raise CheckpointError(
            f"{path} has init_lora_weights={quoted(beginning)}, which changes the base "
            "model's weights before training. Convert the adapter to a plain LoRA when "
            "saving (path_initial_model_for_weight_conversion), or merge it with PEFT"
        )


def rank_and_scale(path: Path, data: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale of one module's update.

    Args:
        path: of the file, for people.
        data: its content.
        module: the module's name in the base, such as `model.layers.0.self_attn.q_proj`.

    Raises:
        CheckpointError: a value is not a number, or a pattern cannot be used.
    """
    rank = _of_module(path, data, "rank_pattern", module, data.get("r", 8))
    alpha = _of_module(path, data, "alpha_pattern", module, data.get("lora_alpha", 8))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{path} has the rank {quoted(rank)}; it must be a positive integer")
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) < _LARGEST_ALPHA:
        raise CheckpointError(f"{path} has the lora_alpha {quoted(alpha)}; it must be a number")
    return rank, alpha / (math.sqrt(rank) if data.get("use_rslora") else rank)


def _of_module(path: Path, data: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The first pattern that fits decides, as in PEFT."""
    patterns = data.get(key) or {}
    if not isinstance(patterns, Mapping) or len(patterns) > _MOST_PATTERNS:
        raise CheckpointError(
            f"{path} must have an object of up to {_MOST_PATTERNS:,} patterns as {key}, found "
            f"{quoted(patterns)}"
        )
    for pattern, value in patterns.items():
        compiled = _compiled(pattern)
        if compiled is None:
            raise CheckpointError(
                f"{path} has {pattern[:80]!r} in {key}, which is not a supported regular expression"
            )
        if compiled.match(module):
            return value
    return default


@functools.lru_cache(2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """Compiles a pattern as PEFT matches it to a module's name; `None` if it is not valid, or may
    be slow."""
    if len(pattern) > _MOST_PATTERN or _SLOW_PATTERN.search(pattern):
        return None
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError):
        return None
