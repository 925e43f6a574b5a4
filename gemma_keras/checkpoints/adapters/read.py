"""Reads an adapter alone, of any format, for a model that is in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_keras.checkpoints.adapters.base import PEFT_CONFIG, folder_with_adapter
from gemma_keras.checkpoints.adapters.gguf import open_gguf_adapter
from gemma_keras.checkpoints.adapters.merge import Change, LowRank
from gemma_keras.checkpoints.adapters.peft import PeftAdapter, changes_of, open_adapter
from gemma_keras.checkpoints.hf.reader import metadata_of
from gemma_keras.checkpoints.low_rank import Adapter, Pair
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError

BASE_KEY = "gemma_keras.base_norms"  # in the metadata of the safetensors file
_NEAR = 0.001  # means of norms in 16 bits differ by less


@dataclasses.dataclass(frozen=True)
class ReadAdapter:
    """An adapter whose matrices are known by shape, and not read yet.

    Attributes:
        path: of the file or folder.
        low_ranks: the canonical name of a matrix to its update.
        dropout: the share of its inputs that training leaves out.
        rslora: whether its scale was given as alpha / sqrt(rank).
        base_norms: the mean of each norm's scale in its base, if it says them.
    """

    path: Path
    low_ranks: Mapping[str, LowRank]
    dropout: float = 0.0
    rslora: bool = False
    base_norms: Mapping[str, float] | None = None

    def adapter(self) -> Adapter:
        """The matrices, read.

        Raises:
            CheckpointError: a value is not finite.
        """
        pairs = {}
        for name, one in self.low_ranks.items():
            a, b = one.down().T, one.up().T
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise CheckpointError(
                    f"{self.path} has matrices of {one.name} with values that are not finite"
                )
            pairs[name] = Pair(a, b, one.scale * a.shape[1])
        return Adapter(pairs, self.dropout, self.rslora)

    def check_base(self, norms: Mapping[str, float], how: str) -> None:
        """Refuse a base whose norms are not those of the adapter's.

        Args:
            norms: as `norm_means` has them.
            how: what the user can do, for the message.

        Raises:
            CheckpointError: they are not.
        """
        if self.base_norms is None:
            return
        for name, mean in norms.items():
            said = self.base_norms.get(name)
            if said is None or abs(said - mean) > _NEAR * max(1.0, abs(mean)):
                raise CheckpointError(
                    f"{self.path} was trained on another base model: the norm {name} has the mean "
                    f"{mean:.4g} here and {'no value' if said is None else f'{said:.4g}'} there; "
                    f"{how}"
                )


def norm_means(config: GemmaConfig, weights: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each norm's scale, by which a base is known whatever its precision is."""
    norms = (spec.name for spec in weight_specs(config).values() if spec.kind == "norm")
    return {name: float(weights[name].mean()) for name in norms}


def read_adapter(path: Path, config: GemmaConfig) -> ReadAdapter:
    """Open an adapter for a model of a configuration.

    Args:
        path: a folder of PEFT's, or a GGUF file.
        config: of the model.

    Raises:
        CheckpointError: it cannot be read, has matrices of other shapes, or changes
            more than matrices of the blocks.
    """
    if folder_with_adapter(path):
        adapter = open_adapter(path)
        dropout = adapter.config.get("lora_dropout") or 0.0
        good = isinstance(dropout, (int, float)) and 0 <= dropout < 1
        found = ReadAdapter(
            path,
            _low_ranks(path, changes_of(adapter, config), config),
            float(dropout) if good else 0.0,
            bool(adapter.config.get("use_rslora")),
            _base_norms(adapter),
        )
    else:
        gguf = open_gguf_adapter(path) if path.is_file() else None
        if gguf is None:
            raise CheckpointError(
                f"{path} is not an adapter: neither a folder with {PEFT_CONFIG} nor a GGUF file "
                "with LoRA; a .lora.h5 file is loaded by backbone.load_lora_weights"
            )
        found = ReadAdapter(path, _low_ranks(path, gguf.changes(weight_specs(config)), config))
    return found


def _low_ranks(
    path: Path, changes: Mapping[str, tuple[Change, ...]], config: GemmaConfig
) -> dict[str, LowRank]:
    specs = weight_specs(config)
    found = {}
    for name, steps in changes.items():
        if not steps:
            continue
        (*others, last) = steps
        spec = specs.get(name)
        if others or spec is None or spec.kind != "matrix" or not isinstance(last, LowRank):
            raise CheckpointError(
                f"{path} changes {name}, and LoRA here stands beside matrices of the blocks alone; "
                "open the adapter with from_preset, which merges it"
            )
        if tuple(last.shape) != spec.file_shape:
            raise CheckpointError(
                f"{path} changes {spec.hf} of shape {list(last.shape)}, but in this model it has "
                f"shape {list(spec.file_shape)}; the adapter is for another size"
            )
        found[name] = last
    return found


def _base_norms(adapter: PeftAdapter) -> dict[str, float] | None:
    files = {tensor.shard for tensor in adapter.tensors.values()}
    said: Any = next((m[BASE_KEY] for m in map(metadata_of, files) if BASE_KEY in m), None)
    if said is None:
        return None
    try:
        norms = json.loads(said)
        return {str(name): float(mean) for name, mean in norms.items() if math.isfinite(mean)}
    except (ValueError, AttributeError, TypeError):
        raise CheckpointError(
            f"{adapter.folder} says what its base is like in a form that cannot be read: "
            f"{str(said)[:80]!r}"
        ) from None
