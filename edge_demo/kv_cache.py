"""Keys and values of the tokens seen so far, in buffers the graph reads and writes in place."""

from __future__ import annotations

import numpy as np

from edge_demo.bundle import GraphSpec, RopeSpec

_STEP = 256


class KVCache:
    """One numpy buffer for each `past_key_values.*` input, `(batch, kv_heads, capacity, head_dim)`.

    The buffers grow in steps as tokens come, rather than being made for the longest context.

    Args:
        graph: the engine graph, whose contract gives the shapes.
        ropes: the rotary tables, which have to reach as far as the buffers.
        limit: the largest capacity, in tokens.

    Attributes:
        buffers: input name to buffer.
        tables: input name to rotary table, `(capacity, dims)`.
        capacity: tokens that fit now.
    """

    def __init__(self, graph: GraphSpec, ropes: tuple[RopeSpec, ...], limit: int) -> None:
        self._specs = [s for s in graph.inputs if s.name.startswith("past_key_values.")]
        self._ropes = ropes
        self._limit = limit
        self.capacity = 0
        self.buffers: dict[str, np.ndarray] = {
            spec.name: np.zeros(self._shape(spec.shape, 0), np.float32) for spec in self._specs
        }
        self.tables: dict[str, np.ndarray] = {}

    @staticmethod
    def _shape(shape: tuple[int | str, ...], capacity: int) -> tuple[int, ...]:
        sizes = {"batch": 1, "capacity": capacity}
        return tuple(d if isinstance(d, int) else sizes[d] for d in shape)

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` in all; true if the buffers were replaced by larger ones."""
        if tokens <= self.capacity:
            return False
        # A half more than now, so that growing costs little in the end, in whole steps.
        wanted = max(tokens, self.capacity + self.capacity // 2)
        old, self.capacity = self.capacity, min(self._limit, -(-wanted // _STEP) * _STEP)
        for spec in self._specs:
            grown = np.zeros(self._shape(spec.shape, self.capacity), np.float32)
            grown[:, :, :old] = self.buffers[spec.name]
            self.buffers[spec.name] = grown
        for rope in self._ropes:
            self.tables[f"{rope.name}.cos"], self.tables[f"{rope.name}.sin"] = rope_table(
                rope, self.capacity
            )
        return True

    @property
    def num_bytes(self) -> int:
        """What the buffers and tables take, in bytes."""
        return sum(a.nbytes for a in (*self.buffers.values(), *self.tables.values()))


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
