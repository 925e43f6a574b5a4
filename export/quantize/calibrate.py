"""Watching what flows into each matrix, one decoder block in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from keras import ops

from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig
from gemma_keras.layers import GemmaDecoderBlock

TEXT = Path(__file__).with_name("calibration.txt")
# Key, value and up projections see what the query and gate projections see.
OBSERVED = {
    "attention.query": ("attention.query", "attention.key", "attention.value"),
    "attention.output": ("attention.output",),
    "mlp.gate": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.down",),
}


def observe(
    config: GemmaConfig, weights: Mapping[str, np.ndarray], ids: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    """Second moments of the inputs of each block's matrices, on one text.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        ids: the text's tokens, `(batch, length)`.

    Yields:
        For each block: name within the block, of `OBSERVED`, to the mean of the inputs' outer
        products, float32 `[in, in]`.
    """
    specs = weight_specs(config)
    x = weights["token_embedding"][ids] * np.float32(config.embedding_scale)
    for i, layer in enumerate(config.layers):
        block = GemmaDecoderBlock(
            layer, config.hidden_dim, config.norm_epsilon, "zeros", dtype="float32"
        )
        block.build((1, ids.shape[1], config.hidden_dim))
        prefix = f"layers.{i}."
        for name in specs:
            if name.startswith(prefix):
                block.variable(name.removeprefix(prefix)).assign(weights[name])
        with _watch(block) as moments:
            for row in range(len(x)):
                out = block(ops.convert_to_tensor(x[row : row + 1], dtype="float32"))
                x[row] = ops.convert_to_numpy(out)[0]
        yield {name: moment.mean for name, moment in moments.items()}


def channel_rms(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    ids: np.ndarray,
    on_progress: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """Root mean square of each input channel of each observed matrix: name to float32 `[in]`."""
    found = {}
    for i, moments in enumerate(observe(config, weights, ids)):
        for name, moment in moments.items():
            found[f"layers.{i}.{name}"] = np.sqrt(np.diag(moment))
        on_progress(i + 1, len(config.layers))
    return found


@dataclasses.dataclass
class _Moment:
    total: np.ndarray | None = None
    count: int = 0

    def add(self, inputs: np.ndarray) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        product = flat.T @ flat
        self.total = product if self.total is None else self.total + product
        self.count += len(flat)

    @property
    def mean(self) -> np.ndarray:
        assert self.total is not None
        return self.total / np.float32(self.count)


@contextlib.contextmanager
def _watch(block: GemmaDecoderBlock) -> Iterator[dict[str, _Moment]]:
    moments = {name: _Moment() for name in OBSERVED}

    def watch(name: str) -> None:
        dense = block.sublayer(name)
        call = dense.call

        def observed(inputs, *args, **kwargs):
            moments[name].add(np.asarray(ops.convert_to_numpy(inputs), np.float32))
            return call(inputs, *args, **kwargs)

        dense.call = observed

    for name in OBSERVED:
        watch(name)
    yield moments
