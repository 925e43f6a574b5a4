"""The key-value cache: buffers that the graph reads and updates in place."""

from __future__ import annotations

import dataclasses

import numpy as np

from edge_demo.bundle.manifest import GraphSpec, RopeSpec, TensorSpec, WindowSpec
from edge_demo.engine import cache_size
from edge_demo.engine.prompt_chunks import PromptRun


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot of the buffers, from which an engine can continue.

    Attributes:
        tokens: their ids.
        filled: input name to keys or values, `(batch, kv_heads, places, head_dim)`, as many places
            as `KVCache.layout` says.
        prompt_run: how the first of them were run.
    """

    tokens: list[int]
    filled: dict[str, np.ndarray]
    prompt_run: PromptRun

    def copy(self) -> Snapshot:
        """Returns a copy that later runs do not change."""
        filled = {name: rows.copy() for name, rows in self.filled.items()}
        return dataclasses.replace(self, tokens=list(self.tokens), filled=filled)


class KVCache:
    """One numpy buffer for each `past_key_values.*` input, `(batch, kv_heads, capacity, head_dim)`.

    Buffers of global layers grow in steps as tokens are added; they are not allocated for the
    longest context at once. Those of layers with a sliding window keep one size, whatever the
    context: of `length` tokens, the operator keeps `resident(length)` at the front and forgets the
    others (`GroupQueryAttention`'s `sliding_window_cache`, onnxruntime, ContribOperators.md).

    Args:
        graph: the engine graph, whose contract gives the shapes.
        ropes: the rotary tables, which have to reach as far as the buffers.
        windows: the sliding windows, which the shapes name.
        limit: the largest capacity, in tokens.
        batch: texts that the buffers hold, a row each.

    Attributes:
        buffers: input name to buffer.
        tables: input name to rotary table, `(capacity, dims)`.
        capacity: tokens that fit now.
        batch: as it was given.
        reached: number of tokens up to which the buffers were last written, also by an interrupted
            run.
    """

    def __init__(
        self,
        graph: GraphSpec,
        ropes: tuple[RopeSpec, ...],
        windows: tuple[WindowSpec, ...],
        limit: int,
        batch: int = 1,
    ) -> None:
        specs = [s for s in graph.inputs if s.name.startswith("past_key_values.")]
        self._places = {s.name: str(s.shape[2]) for s in specs}
        self._growing = [s for s in specs if s.shape[2] == "capacity"]
        self._ropes = ropes
        self._windows = windows
        self._limit = limit
        self.batch = batch
        self.capacity = 0
        self.reached = 0
        # Memory that is not written to is not allocated, so a window may be longer than the text.
        self._sizes = {w.name: w.length + cache_size.SLACK for w in windows} | {
            "batch": batch,
            "capacity": 0,
        }
        self.buffers: dict[str, np.ndarray] = {
            spec.name: np.zeros(self._shape(spec), spec.dtype) for spec in specs
        }
        self.tables: dict[str, np.ndarray] = {}

    def _shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else self._sizes[d] for d in spec.shape)

    def reserve(self, tokens: int, rows: int | None = None) -> bool:
        """Make room for `tokens` in all; true if the buffers were replaced by larger ones.

        Args:
            tokens: of the longest text.
            rows: how many of the first rows hold a text; `None` for all. Others are not copied, so
                that they take no memory.
        """
        if tokens <= self.capacity:
            return False
        # Half more than now, in whole steps, so that growing takes little time in total.
        wanted = max(tokens, self.capacity + self.capacity // 2)
        old, capacity = self.capacity, cache_size.capacity_for(wanted, self._limit)
        self._sizes["capacity"] = capacity
        grown = {spec.name: np.zeros(self._shape(spec), spec.dtype) for spec in self._growing}
        for name, buffer in grown.items():
            buffer[:rows, :, :old] = self.buffers[name][:rows]
        for rope in self._ropes:
            cos, sin = rope_table(rope, capacity)
            self.tables |= {f"{rope.name}.cos": cos, f"{rope.name}.sin": sin}
        self.buffers |= grown  # only now, so that the cache stays valid after Ctrl-C
        self.capacity = capacity
        return True

    def holds(self, length: int, reached: int | None = None) -> bool:
        """Whether the keys and values of the first `length` tokens are all present, now or at
        `reached` tokens."""
        tokens = self.reached if reached is None else reached
        return all(
            tokens - _resident(tokens, w.length) == length - _resident(length, w.length)
            for w in self._windows
        )

    def layout(self, length: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Data type and shape of what `length` tokens leave in each buffer, from its front on."""
        windows = {w.name: _resident(length, w.length) for w in self._windows}
        layout = {}
        for name, buffer in self.buffers.items():
            batch, heads, _, dim = buffer.shape
            places = windows.get(self._places[name], length)
            layout[name] = buffer.dtype, (batch, heads, places, dim)
        return layout

    def filled(self) -> dict[str, np.ndarray]:
        """Returns views of the keys and values of the tokens reached, in the shapes of `layout`."""
        return {
            name: self.buffers[name][:, :, : shape[2]]
            for name, (_, shape) in self.layout(self.reached).items()
        }

    def row(self, row: int, length: int) -> dict[str, np.ndarray]:
        """Returns views of one row's keys and values after `length` tokens, as `filled` does."""
        return {
            name: self.buffers[name][row : row + 1, :, : shape[2]]
            for name, (_, shape) in self.layout(length).items()
        }

    def fill(self, filled: dict[str, np.ndarray], row: int = 0) -> None:
        """Copy one text's keys and values, as `filled` returns them, into a row; there must be
        room."""
        for name, rows in filled.items():
            self.buffers[name][row, :, : rows.shape[2]] = rows[0]

    @property
    def num_bytes(self) -> int:
        """The size of buffers and tables in bytes."""
        return sum(a.nbytes for a in (*self.buffers.values(), *self.tables.values()))


def _resident(tokens: int, window: int) -> int:
    """How many of the last tokens a windowed buffer holds: a function of the total alone.

    With capacity C and window W, `T - G * ceil((T - C) / G)` of T tokens beyond C, where
    `G = C - W + 1`; onnxruntime, ContribOperators.md.
    """
    beyond, step = tokens - (window + cache_size.SLACK), cache_size.SLACK + 1
    return tokens if beyond <= 0 else tokens - step * -(-beyond // step)


def rope_table(rope: RopeSpec, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for positions 0 to `length - 1`: two float32 `(length, dims)`.

    Rotary position embedding, Su et al., 2021, arXiv:2104.09864.
    """
    exponents = -np.arange(rope.dims, dtype=np.float32) / np.float32(rope.dims)
    frequencies = (rope.theta**exponents / rope.scale).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    # rounded once, from float64, as `model.onnx` does: the same to the last bit on any processor
    exact = angles.astype(np.float64)
    return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)
