"""Watching what flows into each matrix, one decoder block in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from keras import ops

from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig
from gemma_keras.layers import GemmaDecoderBlock

TEXT = Path(__file__).with_name("calibration.txt")
_OBSERVED = ("attention.query", "attention.output", "mlp.gate", "mlp.down")


def channel_rms(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    ids: Sequence[int],
    on_progress: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """Root mean square of each input channel of each matrix, on one text.

    Key, value and up projections see what the query and gate projections see, and are left out.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        ids: the text's tokens.
        on_progress: told the blocks done and those in all.

    Returns:
        Matrix name to float32 `[in]`.
    """
    specs = weight_specs(config)
    x = weights["token_embedding"][np.asarray(ids)] * np.float32(config.embedding_scale)
    x = ops.convert_to_tensor(x[None], dtype="float32")  # (1, length, hidden_dim)
    found: dict[str, np.ndarray] = {}
    for i, layer in enumerate(config.layers):
        block = GemmaDecoderBlock(
            layer, config.hidden_dim, config.norm_epsilon, "zeros", dtype="float32"
        )
        block.build((1, len(ids), config.hidden_dim))
        prefix = f"layers.{i}."
        for name in specs:
            if name.startswith(prefix):
                block.variable(name.removeprefix(prefix)).assign(weights[name])
        with _observe(block) as seen:
            x = block(x)
        found |= {prefix + name: rms for name, rms in seen.items()}
        on_progress(i + 1, len(config.layers))
    return found


@contextlib.contextmanager
def _observe(block: GemmaDecoderBlock) -> Iterator[dict[str, np.ndarray]]:
    seen: dict[str, np.ndarray] = {}

    def watch(name: str) -> None:
        dense = block.sublayer(name)
        call = dense.call

        def observed(inputs, *args, **kwargs):
            square = ops.mean(ops.square(ops.cast(inputs, "float32")), axis=(0, 1))
            seen[name] = np.sqrt(np.asarray(ops.convert_to_numpy(square)))
            return call(inputs, *args, **kwargs)

        dense.call = observed

    for name in _OBSERVED:
        watch(name)
    yield seen
