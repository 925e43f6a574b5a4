"""A checkpoint whose weights are changed as they are read: low-rank updates added, tables replaced.

Whatever format the base has, a tensor or a piece of a table is read from it, changed and handed on,
so merging takes no more memory than reading.
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
    "the adapter changes the embedding or the head alone, so the model has a table for each, where "
    "its base has one for both"
)
_PIECE_BYTES = 16 << 20  # of two tables that are compared

ReadTensor = Callable[[], np.ndarray]


class Change(Protocol):
    """What an adapter does to one weight, a matrix or table in rows `[out, in]` as in a file."""

    @property
    def replaces(self) -> bool:
        """Whether nothing of the base's weight is left."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it fits, in a file."""
        ...

    def rows(self, first: int, last: int) -> np.ndarray:
        """What is added to these rows, or stands in their place, float32."""
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
    """The adapter has the whole weight.

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

    A head that is tied to the embedding becomes a table of its own where the adapter changes only
    one of the two, or both apart: while the adapter was trained, each used its own.

    Args:
        base: what the adapter was trained on.
        changes: canonical name to what is done to that weight, in order; `head` also of a tied one.
        ties_head: whether what is done to the embedding is done to a tied head too.

    Raises:
        CheckpointError: the adapter changes a weight that the base lacks, or of another shape.
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
                f"the adapter changes {name}, which its base has not; it is an adapter for another "
                "model"
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
                f"the adapter brings a table of {config.vocabulary_size:,} tokens, and its base's "
                f"{name} has {base.config.vocabulary_size:,}; resize the base as before training"
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
    """Whether two changes are of the same shape and equal in every number."""
    if one is other:
        return True
    if one.shape != other.shape or one.replaces != other.replaces:
        return False
    step = max(1, _PIECE_BYTES // (4 * one.shape[-1]))
    ends = [*range(0, one.shape[0], step), one.shape[0]]
    return all(
        np.array_equal(one.rows(*pair), other.rows(*pair)) for pair in itertools.pairwise(ends)
    )


def _adapted_config(
    config: GemmaConfig, changes: Mapping[str, tuple[Change, ...]], *, ties_head: bool
) -> GemmaConfig:
    """The base's, with the vocabulary of a table that the adapter brings, and a head of its own if
    it has come apart from the embedding."""
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
                f"the adapter changes {spec.hf} as one of shape {list(step.shape)}, its base's has "
                f"{list(spec.file_shape)}; it is an adapter for another model"
            )


@dataclasses.dataclass(frozen=True)
class _Merged:
    """Reads a base's weights and changes them."""

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
