"""Reads a LoRA adapter from a GGUF file, as llama.cpp's `convert_lora_to_gguf.py` writes it.

A matrix named `X` in the base's GGUF has `X.lora_a`, `[rank, in]`, and `X.lora_b`, `[out, rank]`;
of the embedding the two are `[vocabulary, rank]` and `[hidden, rank]`. The scale is alpha / rank.

Source: llama.cpp's `llama-adapter.cpp`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from gemma_keras.checkpoints.adapters.base import Source, open_base_of
from gemma_keras.checkpoints.adapters.merge import Change, LowRank, adapted, merged_provenance
from gemma_keras.checkpoints.first_bytes import begins_as_gguf
from gemma_keras.checkpoints.gguf.file import GGUFFile
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.errors import CheckpointError, quoted

_HALVES = (".lora_a", ".lora_b")


@dataclasses.dataclass(frozen=True)
class GGUFAdapter:
    """A LoRA in a GGUF file, its header read."""

    file: GGUFFile
    alpha: float

    def merged(self, base: Source | None, open_base: Callable[[Source], Checkpoint]) -> Checkpoint:
        """As `gemma_keras.checkpoints.adapters.base.Adapter.merged`."""
        checkpoint = self.base_alone(base, open_base)
        merged = adapted(checkpoint, self.changes(weight_specs(checkpoint.config)))
        name = self.file.path.name
        return dataclasses.replace(
            merged,
            provenance=merged_provenance(checkpoint, name, self.file.path.stem),
        )

    def base_alone(
        self, base: Source | None, open_base: Callable[[Source], Checkpoint]
    ) -> Checkpoint:
        """As `gemma_keras.checkpoints.adapters.base.Adapter.base_alone`."""
        return open_base_of(self.file.path, base, open_base)

    def changes(self, specs: Mapping[str, WeightSpec]) -> dict[str, tuple[Change, ...]]:
        """Canonical name to the change of that weight.

        Raises:
            CheckpointError: it changes a tensor that is not among `specs`, or lacks a matrix.
        """
        by_file_name = {spec.gguf: spec for spec in specs.values() if spec.kind != "norm"}
        changes: dict[str, tuple[Change, ...]] = {}
        for name in self.file.tensors:
            if not name.endswith(_HALVES):
                raise CheckpointError(
                    f"{self.file.path} holds {name}, which is not a LoRA matrix; merge the "
                    "adapter with the tool that made it"
                )
            changed = name[: -len(_HALVES[0])]
            if changed not in by_file_name:
                raise CheckpointError(
                    f"{self.file.path} changes {changed}, but the base model has no such "
                    "tensor; use the base model that the adapter was trained on"
                )
            spec = by_file_name[changed]
            if spec.name not in changes:
                changes[spec.name] = (self._low_rank(spec),)
        if not changes:
            raise CheckpointError(f"{self.file.path} contains no LoRA matrices")
        return changes

    def _low_rank(self, spec: WeightSpec) -> LowRank:
        names = [spec.gguf + half for half in _HALVES]
        for name in names:
            if name not in self.file.tensors:
                raise CheckpointError(f"{self.file.path} lacks {name}; convert the adapter again")
        a, b = (self.file.tensors[name].shape for name in names)
        embedding = spec.name == "token_embedding"
        if len(a) != 2 or len(b) != 2 or b[1] != a[1 if embedding else 0]:
            raise CheckpointError(
                f"{self.file.path} has matrices of shapes {list(a)} and {list(b)} for "
                f"{spec.gguf}, which do not form a low-rank update"
            )
        scale = self.alpha / b[1] if self.alpha else 1.0  # as llama.cpp reads an alpha of 0
        if embedding:
            return LowRank(
                spec.gguf,
                lambda: self.file.read(names[0]),
                lambda: self.file.read(names[1]).T,
                (a[0], b[0]),
                scale,
            )
        return LowRank(
            spec.gguf,
            lambda: self.file.read(names[1]),
            lambda: self.file.read(names[0]),
            (b[0], a[1]),
            scale,
        )


def open_gguf_adapter(path: Path) -> GGUFAdapter | None:
    """Returns the adapter in a GGUF file; `None` if the file is not an adapter.

    Raises:
        CheckpointError: it is not a LoRA adapter, or it is damaged.
    """
    if not begins_as_gguf(path):
        return None
    file = GGUFFile(path)
    if file.metadata.get("general.type") != "adapter":
        return None
    kind = file.metadata.get("adapter.type")
    if kind != "lora":
        raise CheckpointError(
            f"{path} is an adapter of type {quoted(kind)}; only lora can be merged"
        )
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise CheckpointError(
            f"{path} is an adapter that acts only after certain tokens (aLoRA); it cannot be merged"
        )
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not math.isfinite(alpha):
        raise CheckpointError(
            f"{path} has adapter.lora.alpha = {quoted(alpha)}; it must be a number"
        )
    return GGUFAdapter(file, float(alpha))
