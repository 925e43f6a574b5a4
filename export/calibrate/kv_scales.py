"""Measures the scales for int8 keys and values, one for each channel of a head.

Keys are stored after the rotation. The rotation mixes channels i and `i + head_dim / 2`, so these
two share one scale, from the length of the pair. Then no later position exceeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from export.graph.contract import INTERCHANGE_FILE, interchange_inputs
from export.graph.run_in_chunks import run_in_chunks
from gemma_keras.config import GemmaConfig

_MARGIN = 1.25  # margin above the largest value observed; larger values are clipped
_MOST = 127


def measure_kv_scales(
    folder: Path,
    config: GemmaConfig,
    ids: np.ndarray,
    layers: Collection[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Observe a model's keys and values on a text.

    Args:
        folder: of its interchange graph and weights.
        config: the model's.
        ids: of the text, `(batch, length)`.
        layers: by index.
        on_progress: called with (chunks of the graph done, all of them).

    Returns:
        `present.{i}.key` and `present.{i}.value` to float32 `[1, kv_heads, 1, head_dim]`, as
        `GroupQueryAttention` takes them.

    Raises:
        ExportError: the graph does not run.
    """
    largest = {"key": _largest_of_pairs, "value": _largest}
    picks = {f"present.{i}.{part}": pick for i in layers for part, pick in largest.items()}
    inputs = [interchange_inputs(config, row[None]) for row in ids]
    runs = run_in_chunks(folder / INTERCHANGE_FILE, inputs, picks, on_progress)
    return {name: _scale(np.max([run[name] for run in runs], axis=0)) for name in picks}


def _largest(values: np.ndarray) -> np.ndarray:
    """Of `(1, kv_heads, length, head_dim)`, over the length."""
    return np.abs(values).max(axis=2, keepdims=True)


def _largest_of_pairs(keys: np.ndarray) -> np.ndarray:
    first, second = np.split(keys, 2, axis=-1)
    return np.tile(_largest(np.hypot(first, second)), 2)


def _scale(largest: np.ndarray) -> np.ndarray:
    typical = float(largest.mean()) or 1.0  # a channel that is always 0 needs some scale too
    return np.maximum(largest, 1e-3 * typical).astype(np.float32) * np.float32(_MARGIN / _MOST)
