"""Merges an adapter into a checkpoint while its weights are read: adds low-rank updates, replaces
tables.

Each tensor, or chunk of a table, is read from the base model, changed and passed on. So merging
needs no more memory than reading, in any format.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.checkpoints.quantized_grid import GridSource, QuantizedGrid
from gemma_keras.checkpoints.source import Checkpoint, WeightSource
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError

_UNTIED = (
    "the adapter changes only the embedding or only the head, so the merged model stores a "
    "separate table for each"
)
_CHUNK_BYTES = 16 << 20  # size of a chunk when two tables are compared

ReadTensor = Callable[[], np.ndarray]


class Change(Protocol):
    """A change of one weight: a matrix or table in rows `[out, in]`, as in a file."""

    @property
    def replaces(self) -> bool:
        """Whether the change replaces the whole weight of the base model."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, in a file, of the weight that it changes."""
        ...

    def rows(self, first: int, last: int) -> np.ndarray:
        """Returns what is added to these rows, or replaces them, float32."""
        ...


@dataclasses.dataclass(frozen=True)
class LowRank:
    """`scale * up @ down` is added: LoRA's matrices B and A (https://arxiv.org/abs/2106.09685).

    Attributes:
        name: of the module in the adapter, for people.
        up: reads float32 `[out, rank]`.
        down: reads float32 `[rank, in]`.
        shape: `[out, in]`.
        scale: of the product.
    """

    name: str
    up: ReadTensor
    down: ReadTensor
    shape: tuple[int, ...]
    scale: float
    replaces: bool = dataclasses.field(default=False, init=False)

    def rows(self, first: int, last: int) -> np.ndarray:
        up, down = self.up()[first:last], self.down()
        if not (np.isfinite(up).all() and np.isfinite(down).all()):
            raise CheckpointError(
                f"the adapter's matrices of {self.name} hold values that are not finite"
            )
        return np.float32(self.scale) * (up @ down)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A change that replaces the whole weight.

    Attributes:
        name: of the tensor in the adapter, for people.
        read: reads float32, as a Hugging Face file has it.
        read_rows: the same of some rows.
        shape: of the tensor.
    """

    name: str
    read: ReadTensor
    read_rows: Callable[[int, int], np.ndarray]
    shape: tuple[int, ...]
    replaces: bool = dataclasses.field(default=True, init=False)

    def rows(self, first: int, last: int) -> np.ndarray:
        return self.read_rows(first, last)


def adapted(
    base: Checkpoint, changes: Mapping[str, tuple[Change, ...]], *, ties_head: bool = False
) -> Checkpoint:
    """A checkpoint with an adapter merged into it.

    If the adapter changes only one of a tied embedding and head, or changes them differently, the
    head becomes a separate table. In training each had its own change.

    Args:
        base: what the adapter was trained on.
        changes: canonical name to the changes of that weight, in order; `head` also if it is tied.
        ties_head: whether changes of the embedding also apply to a tied head.

    Raises:
        CheckpointError: the adapter changes a weight that the base model lacks, or that has another
            shape.
    """
    was_tied = base.config.tied_head
    config = _adapted_config(base.config, changes, ties_head=was_tied and ties_head)
    changes = {
        name: steps
        for name, steps in changes.items()
        if steps and not (name == "head" and config.tied_head)
    }
    specs = weight_specs(config)
    for name, steps in changes.items():
        if name not in specs:
            raise CheckpointError(
                f"the adapter changes {name}, but the base model has no such tensor; use "
                "the base model that the adapter was trained on"
            )
        _check_shapes(specs[name], steps)
    base_specs = weight_specs(base.config)
    source_of = {name: name for name in specs}
    if was_tied and not config.tied_head:
        source_of["head"] = "token_embedding"
    for name, spec in specs.items():
        kept = not any(step.replaces for step in changes.get(name, ()))
        if kept and base_specs[source_of[name]].file_shape != spec.file_shape:
            raise CheckpointError(
                f"the adapter has a table of {config.vocabulary_size:,} tokens, but the "
                f"base model's {name} has {base.config.vocabulary_size:,}; resize the base "
                "model as it was before training"
            )
    by_file_name = {spec.hf: spec for spec in specs.values()}
    merged = _Merged(base.weights, base_specs, changes, source_of)
    weights = WeightSource(
        config,
        "hf",
        {name: spec.file_shape for name, spec in by_file_name.items()},
        lambda name: merged.rows(by_file_name[name], 0, by_file_name[name].file_shape[0]),
        stored_as=lambda name: merged.stored_as(by_file_name[name]),
        grid=lambda name: merged.grid(by_file_name[name]),
        read_rows=lambda name, first, last: merged.rows(by_file_name[name], first, last),
    )
    remarks = base.remarks
    if was_tied and not config.tied_head:
        remarks = (*remarks, _UNTIED)
    return dataclasses.replace(base, config=config, weights=weights, remarks=remarks)


def merged_provenance(base: Checkpoint, adapter: str, name: str) -> dict[str, Any]:
    """Where a merged model came from: its base, the adapter's file or folder, the model's name."""
    source = dict(base.provenance)
    if "file" in source:
        source["file"] = f"{source['file']} with the adapter {adapter}"
    return source | {"adapter": adapter, "name": name}


def same_rows(one: Change, other: Change) -> bool:
    """Whether two changes have the same shape and equal values."""
    if one is other:
        return True
    if one.shape != other.shape or one.replaces != other.replaces:
        return False
    step = max(1, _CHUNK_BYTES // (4 * one.shape[-1]))
    ends = [*range(0, one.shape[0], step), one.shape[0]]
    return all(
        np.array_equal(one.rows(*pair), other.rows(*pair)) for pair in itertools.pairwise(ends)
    )


def _adapted_config(
    config: GemmaConfig, changes: Mapping[str, tuple[Change, ...]], *, ties_head: bool
) -> GemmaConfig:
    """Returns the base model's configuration, with the vocabulary size of the adapter's table, and
    an untied head if it differs from the embedding."""
    table, head = changes.get("token_embedding", ()), changes.get("head", ())
    for step in (*table, *head):
        if step.replaces:
            config = dataclasses.replace(config, vocabulary_size=step.shape[0])
    if not config.tied_head or ties_head or table == head == ():
        return config
    replaced = [any(step.replaces for step in steps) for steps in (table, head)]
    equal = all(replaced) and len(table) == len(head) and all(map(same_rows, table, head))
    return config if equal else dataclasses.replace(config, tied_head=False)


def _check_shapes(spec: WeightSpec, steps: tuple[Change, ...]) -> None:
    for step in steps:
        if tuple(step.shape) != spec.file_shape:
            raise CheckpointError(
                f"the adapter changes {spec.hf} of shape {list(step.shape)}, but in the "
                f"base model it has shape {list(spec.file_shape)}; use the base model that "
                "the adapter was trained on"
            )


@dataclasses.dataclass(frozen=True)
class _Merged:
    """Reads a base model's weights and applies the changes."""

    base: Mapping[str, np.ndarray]
    base_specs: Mapping[str, WeightSpec]
    changes: Mapping[str, tuple[Change, ...]]
    source_of: Mapping[str, str]

    def rows(self, spec: WeightSpec, first: int, last: int) -> np.ndarray:
        steps = self.changes.get(spec.name, ())
        rows = None
        if not any(step.replaces for step in steps):
            rows = self._base_rows(self.source_of[spec.name], first, last)
        for step in steps:
            change = step.rows(first, last)
            rows = change if rows is None or step.replaces else rows + change
        assert rows is not None
        return rows

    def _base_rows(self, name: str, first: int, last: int) -> np.ndarray:
        spec = self.base_specs[name]
        if isinstance(self.base, WeightSource) and spec.kind != "norm":
            return self.base.rows(name, first, last)
        return spec.to_file(self.base[name], "hf")[first:last]

    def stored_as(self, spec: WeightSpec) -> str | None:
        if spec.name in self.changes or not isinstance(self.base, GridSource):
            return None
        return self.base.stored_as(self.source_of[spec.name])

    def grid(self, spec: WeightSpec) -> QuantizedGrid | None:
        if spec.name in self.changes or not isinstance(self.base, GridSource):
            return None
        return self.base.grid(self.source_of[spec.name])
