"""Reads a PEFT adapter (`adapter_config.json` and LoRA tensors) and merges it into its base model.

An adapter can be a separate folder whose configuration names its base model. It can be in the same
folder as its base model. Or both are in one file, as an unmerged `PeftModel` is saved.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_keras.checkpoints.adapters.base import PEFT_CONFIG
from gemma_keras.checkpoints.adapters.merge import (
    Change,
    LowRank,
    Replaced,
    adapted,
    merged_provenance,
    same_rows,
)
from gemma_keras.checkpoints.adapters.peft_keys import check_adapter_config, rank_and_scale
from gemma_keras.checkpoints.hf.peft_names import is_adapters_tensor, parse
from gemma_keras.checkpoints.hf.reader import (
    StoredTensor,
    check_types,
    explain_pickles,
    read_json,
    read_rows,
    read_tensor,
    stored_in,
    stored_tensors,
    text_side,
)
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError

WEIGHTS_FILE = "adapter_model.safetensors"
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.", "")
_VISION = ("vision_tower", "multi_modal_projector", "model.vision_tower", "model.multi_modal")


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """A LoRA on disk.

    Attributes:
        folder: of the adapter.
        config: the content of `adapter_config.json`, checked.
        tensors: its tensors by their names in the file.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def base(self) -> str | None:
        """Name or path of its base, where its configuration has one."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


def open_adapter(folder: Path) -> PeftAdapter:
    """The adapter of a folder; its tensors are read later.

    Raises:
        CheckpointError: a file is missing or damaged, or it is not a plain LoRA.
    """
    path = folder / PEFT_CONFIG
    config = read_json(path)
    check_adapter_config(path, config)
    weights = folder / WEIGHTS_FILE
    if weights.exists():
        tensors = stored_in(weights)
    else:
        try:
            tensors = stored_tensors(folder)
        except CheckpointError:
            tensors = {}
        tensors = {name: one for name, one in tensors.items() if is_adapters_tensor(name)}
    if not tensors:
        raise CheckpointError(
            f"{folder} has {PEFT_CONFIG} but no {WEIGHTS_FILE} with tensors"
            f"{explain_pickles(folder)}"
        )
    return PeftAdapter(folder, config, tensors)


def merge(adapter: PeftAdapter, base: Checkpoint) -> Checkpoint:
    """Returns the base model with the adapter merged into it while tensors are read.

    Raises:
        CheckpointError: the adapter is for another base model, or changes an unsupported weight.
    """
    changes = changes_of(adapter, base.config)
    ties_head = bool(adapter.config.get("ensure_weight_tying"))
    merged = adapted(base, changes, ties_head=ties_head)
    return dataclasses.replace(
        merged,
        provenance=merged_provenance(base, adapter.folder.name, adapter.folder.name),
        **text_side(adapter.folder, merged),
    )


def changes_of(adapter: PeftAdapter, config: GemmaConfig) -> dict[str, tuple[Change, ...]]:
    """Canonical name to the changes of that weight, in order.

    Args:
        adapter: opened.
        config: of its base.

    Raises:
        CheckpointError: the adapter is for another base model, or changes an unsupported weight.
    """
    specs = weight_specs(config)
    canonical = {spec.hf.removesuffix(".weight"): spec.name for spec in specs.values()}
    canonical["lm_head"] = "head"
    modules: dict[str, dict[str, StoredTensor]] = {}
    adapters: set[str] = set()
    for name, tensor in adapter.tensors.items():
        parsed = parse(name)
        if parsed is None:
            raise CheckpointError(
                f"{adapter.folder} holds the tensor {name}, which is not part of a plain "
                "LoRA; merge the adapter with PEFT (merge_and_unload) and give the merged "
                "folder"
            )
        module, part, adapter_name = parsed
        if module.startswith(_VISION):
            continue  # of the vision encoder, which is not read
        modules.setdefault(module, {})[part] = tensor
        if adapter_name is not None:
            adapters.add(adapter_name)
    if len(adapters) > 1:
        raise CheckpointError(
            f"{adapter.folder} holds the adapters {', '.join(sorted(adapters))} in one "
            "file; save only one of them"
        )
    check_types(tensor for parts in modules.values() for tensor in parts.values())
    changes: dict[str, tuple[Change, ...]] = {}
    for module, parts in modules.items():
        name = canonical.get(_plain(module))
        if name is None:
            raise CheckpointError(
                f"{adapter.folder} changes {module}, but the base model has no such module; "
                "use the base model that the adapter was trained on"
            )
        if name in changes:
            raise CheckpointError(f"{adapter.folder} changes {_plain(module)} twice")
        changes[name] = tuple(_steps(adapter, module, parts))
    if not changes:
        raise CheckpointError(f"{adapter.folder} contains no LoRA matrices for the text model")
    if config.tied_head:
        _think_of_the_tied_head(adapter, changes)
    return changes


def _think_of_the_tied_head(adapter: PeftAdapter, changes: dict[str, tuple[Change, ...]]) -> None:
    """Whether an adapter's embedding also applies to a tied head.

    PEFT trains a copy where `modules_to_save` names the embedding, and leaves the head what it was.
    Otherwise a whole table in the file is the base's own, saved since it had been resized.
    """
    table, head = changes.get("token_embedding", ()), changes.get("head", ())
    if adapter.config.get("ensure_weight_tying"):
        equal = len(table) == len(head) and all(map(same_rows, table, head))
        if head and not equal:
            raise CheckpointError(
                f"{adapter.folder} sets ensure_weight_tying, but changes the head and the "
                "embedding differently"
            )
        return
    saved = adapter.config.get("modules_to_save") or []
    is_copy = any(name.endswith("embed_tokens") for name in saved)
    if not is_copy and not any(step.replaces for step in head):
        changes["head"] = (*(step for step in table if step.replaces), *head)


def _plain(module: str) -> str:
    """Returns a module's name in a text-only model."""
    if module in ("lm_head", "language_model.lm_head"):
        return "lm_head"
    prefix = next(prefix for prefix in _TEXT_PREFIXES if module.startswith(prefix))
    return "model." + module.removeprefix(prefix)


def _steps(adapter: PeftAdapter, module: str, parts: Mapping[str, StoredTensor]) -> list[Change]:
    steps: list[Change] = []
    if "whole" in parts:
        steps.append(_whole(parts["whole"]))
    left = set(parts) - {"whole"}
    if left == {"A", "B"}:
        steps.append(_low_rank(adapter, module, parts["A"], parts["B"]))
    elif left == {"table A", "table B"}:
        steps.append(_low_rank(adapter, module, parts["table A"], parts["table B"], table=True))
    elif left:
        missing = sorted({"A": "B", "B": "A"}[part[-1]] for part in left)[0]
        raise CheckpointError(
            f"{adapter.folder} lacks the matrix lora_{missing} of {module}; save the adapter again"
        )
    return steps


def _whole(tensor: StoredTensor) -> Replaced:
    return Replaced(
        tensor.name,
        lambda: read_tensor(tensor),
        lambda first, last: read_rows(tensor, first, last),
        tensor.shape,
    )


def _low_rank(
    adapter: PeftAdapter, module: str, a: StoredTensor, b: StoredTensor, *, table: bool = False
) -> LowRank:
    """`B @ A`, of an embedding its transpose: PEFT keeps A as `[rank, rows]` there."""
    path = adapter.folder / PEFT_CONFIG
    rank, scale = rank_and_scale(path, adapter.config, module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{adapter.folder} has matrices of shapes {list(a.shape)} and {list(b.shape)} "
            f"for {module}, but {PEFT_CONFIG} gives the rank {rank}"
        )
    if table:
        return LowRank(
            module,
            lambda: read_tensor(a).T,
            lambda: read_tensor(b).T,
            (a.shape[1], b.shape[0]),
            scale,
        )
    return LowRank(
        module,
        lambda: read_tensor(b),
        lambda: read_tensor(a),
        (b.shape[0], a.shape[1]),
        scale,
    )
