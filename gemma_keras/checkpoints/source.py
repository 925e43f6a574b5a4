"""Defines `Checkpoint`: a configuration, weights that are read on demand, and a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gemma_keras.checkpoints.names import FileFormat, WeightSpec, weight_specs
from gemma_keras.checkpoints.quantized_grid import QuantizedGrid
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError
from gemma_keras.text.chat import GEMMA_TURNS, TurnTemplate, all_stops

CHUNK_BYTES = 64 << 20  # chunk of a table in memory at a time, in float32


class NamedWeights(Mapping[str, np.ndarray]):
    """Weights by their canonical names, each read when it is asked for.

    Attributes:
        specs: name to description, of all weights of a model.
    """

    specs: dict[str, WeightSpec]

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # `Mapping` would read the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class WeightSource(NamedWeights):
    """Canonical names to float32 arrays, each read from its file on demand.

    Args:
        config: what the weights must fit.
        file_format: whose names and transforms the file uses.
        file_shapes: name in the file to row-major shape, for all its tensors.
        read: reads one tensor of the file, by its name there, as float32.
        ignore: names in the file that are allowed to be left over.
        stored_as: returns a tensor's quantized type or `None`, by its name in the file.
        read_rows: the same of some rows of a tensor, first and last; reads no others.
        grid: reads one tensor as integers with scales, by its name in the file, `None` where it
            has none; the file's last axis must be the inputs.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """

    def __init__(
        self,
        config: GemmaConfig,
        file_format: FileFormat,
        file_shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        ignore: Callable[[str], bool] = lambda name: False,
        stored_as: Callable[[str], str | None] = lambda name: None,
        grid: Callable[[str], QuantizedGrid | None] = lambda name: None,
        *,
        read_rows: Callable[[str, int, int], np.ndarray],
    ) -> None:
        self.config = config
        self.specs = weight_specs(config)
        self._format: FileFormat = file_format
        self._read = read
        self._read_rows = read_rows
        self._stored_as = stored_as
        self._grid = grid
        left_over = {name for name in file_shapes if not ignore(name)}
        for spec in self.specs.values():
            self._check(spec, file_shapes)
            left_over.discard(spec.file_name(file_format))
        if left_over:
            raise CheckpointError(
                f"the checkpoint holds {len(left_over)} tensors that this model does not "
                f"have: {', '.join(sorted(left_over)[:5])}"
            )

    def _check(self, spec: WeightSpec, file_shapes: Mapping[str, tuple[int, ...]]) -> None:
        name = spec.file_name(self._format)
        shape = file_shapes.get(name)
        if shape is None:
            raise CheckpointError(f"the checkpoint lacks the tensor {name}")
        if tuple(shape) != spec.file_shape:
            raise CheckpointError(
                f"the tensor {name} has shape {list(shape)}, but the configuration needs "
                f"{list(spec.file_shape)}"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        array = self._read(spec.file_name(self._format))
        array = spec.from_file(array, self._format)
        self._check_finite(spec, array)
        return array

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Some rows of a table, or of a matrix as the file has it, its outputs; float32.

        Raises:
            CheckpointError: a value is not finite.
        """
        spec = self.specs[name]
        rows = self._read_rows(spec.file_name(self._format), first, last)
        self._check_finite(spec, rows)
        return rows

    def table_chunks(self, name: str, chunk_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a table in chunks, one in memory at a time: the first row's index, float32 rows.

        Also works for a matrix; its rows are then the outputs, as in the file.

        Raises:
            CheckpointError: a value is not finite.
        """
        num_rows, width = self.specs[name].file_shape
        step = _rows_in(chunk_bytes, width)
        for first in range(0, num_rows, step):
            yield first, self.rows(name, first, min(first + step, num_rows))

    def stored_as(self, name: str) -> str | None:
        """Returns a weight's quantized type in the file, such as `Q4_0`; `None` for floats."""
        return self._stored_as(self.specs[name].file_name(self._format))

    def grid(self, name: str) -> QuantizedGrid | None:
        """Returns a matrix or table as the integers in the file; `None` for an unsupported type.

        Rows are a matrix's outputs or a table's tokens; `values()` are to the bit what reading the
        weight by its name gives (transposed, for a matrix).

        Raises:
            CheckpointError: a scale is not finite.
        """
        spec = self.specs[name]
        grid = None
        if spec.kind != "norm":
            grid = self._grid(spec.file_name(self._format))
        if grid is not None:
            self._check_finite(spec, grid.scales)
            if grid.offsets is not None:
                self._check_finite(spec, grid.offsets)
        return grid

    def _check_finite(self, spec: WeightSpec, array: np.ndarray) -> None:
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"the tensor {spec.file_name(self._format)} holds values that are not finite"
            )


@runtime_checkable
class TableSource(Protocol):
    """Weights whose tables can be read in chunks."""

    def table_chunks(self, name: str, chunk_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """As `table_chunks`."""
        ...


def table_chunks(
    weights: Mapping[str, np.ndarray], name: str, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields a table in chunks of about `chunk_bytes`: the first row's index, float32 rows.

    If the weights are a `TableSource`, only one chunk is in memory.
    """
    if isinstance(weights, TableSource):
        return weights.table_chunks(name, chunk_bytes)
    return row_chunks(weights[name], chunk_bytes)


def finite(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a weight of a model in memory, after checking that it is finite.

    Raises:
        CheckpointError: a value is not finite.
    """
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"the model's weight {name} holds values that are not finite, for example after "
            "a training whose loss became NaN; load the model again"
        )
    return array


def row_chunks(
    array: np.ndarray, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields an array in chunks of about `chunk_bytes` of float32: the first row's index, the
    rows."""
    step = _rows_in(chunk_bytes, array.shape[1])
    for first in range(0, len(array), step):
        yield first, array[first : first + step]


def _rows_in(chunk_bytes: int, width: int) -> int:
    return max(1, chunk_bytes // (4 * width))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        config: its architecture.
        weights: canonical name to float32 array, read on demand.
        tokenizer_model: the SentencePiece model, serialized; `None` if the checkpoint has none.
            Text does not produce its control pieces; see `special_pieces`.
        instruction_tuned: whether it was tuned to follow `turns`.
        provenance: where it came from, for people and for the bundle: `format`, `name`, `license`,
            and as far as it is known `file`; `repository`, the name on the Hugging Face Hub that it
            was fetched by; `preset`, its name among KerasHub's; `base_model`, the repository that
            it says it was made from; `through`, what held it since, and may have trained it.
        notices: licence files that came with the weights and must travel on: name to content.
        stop: ids that end a text, as far as its files name them; `stop_ids` are all.
        turns: the turn template that it follows, or that its tokenizer has tokens for.
        chat_template: its own template in Jinja, whether or not that could be recognized.
        remarks: what was ignored or changed while reading, one sentence each.
    """

    config: GemmaConfig
    weights: Mapping[str, np.ndarray]
    tokenizer_model: bytes | None
    instruction_tuned: bool
    provenance: dict[str, Any]
    notices: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    stop: tuple[int, ...] = ()
    turns: TurnTemplate = GEMMA_TURNS
    chat_template: str | None = None
    remarks: tuple[str, ...] = ()

    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text: those that its files name, its tokenizer's end of a text and, of
        an instruction-tuned model, that of a turn; empty without a tokenizer.

        Raises:
            ValueError: the tokenizer lacks the tokens of the turns.
        """
        if self.tokenizer_model is None:
            return ()
        return all_stops(
            self.tokenizer_model, self.stop, self.turns if self.instruction_tuned else None
        )


def file_chunks(
    checkpoint: Checkpoint, spec: WeightSpec, file_format: FileFormat
) -> Iterator[np.ndarray]:
    """Yields a weight as a file stores it, float32 in order of rows; only one chunk of a table is
    in memory.

    Raises:
        CheckpointError: the weight is missing or has another shape.
    """
    if spec.name not in checkpoint.weights:
        raise CheckpointError(f"the weights lack {spec.name}")
    if spec.kind == "table":
        chunks = (rows for _, rows in table_chunks(checkpoint.weights, spec.name))
    else:
        array = spec.to_file(checkpoint.weights[spec.name], file_format)
        chunks = iter([array]) if array.ndim == 1 else (rows for _, rows in row_chunks(array))
    wrong = CheckpointError(f"{spec.name} must have the shape {list(spec.shape)}")
    num_rows = 0
    for chunk in chunks:
        num_rows += len(chunk)
        if chunk.shape[1:] != spec.file_shape[1:] or num_rows > spec.file_shape[0]:
            raise wrong
        yield np.ascontiguousarray(chunk, np.float32)
    if num_rows != spec.file_shape[0]:
        raise wrong


def check_range(array: np.ndarray, largest: float, name: str, stored_as: str) -> None:
    """Raise an error for values that are not finite, or too large for another type.

    Args:
        array: float32.
        largest: the largest magnitude of `stored_as`.
        name: of the weight.
        stored_as: the type, for people.
    """
    greatest = np.abs(array).max()
    if not greatest <= largest:
        raise CheckpointError(
            f"{name} holds {greatest:g}, but the largest {stored_as} is {largest:g}; write "
            "another type"
        )
