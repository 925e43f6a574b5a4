"""The float model run one decoder block at a time: what exports are measured against.

The Keras layers do the work, but only one block of them is in memory, so a model of any size can be
run on a laptop, for as many tokens as are wanted at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from keras import ops

from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig
from gemma_keras.layers import GemmaDecoderBlock

_VOCABULARY_BYTES = 256 << 20  # of the head's table, cast at once


def embedded(config: GemmaConfig, weights: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """What the first block sees of ids `(batch, length)`: float32 `(batch, length, hidden_dim)`."""
    table = weights["token_embedding"]
    return np.asarray(table[ids], np.float32) * np.float32(config.embedding_scale)


def load_block(config: GemmaConfig, weights: Mapping[str, np.ndarray], i: int) -> GemmaDecoderBlock:
    """Decoder block `i` in float32, with its weights."""
    block = GemmaDecoderBlock(
        config.layers[i], config.hidden_dim, config.norm_epsilon, "zeros", dtype="float32"
    )
    block.build((1, 1, config.hidden_dim))
    prefix = f"layers.{i}."
    for name in weight_specs(config):
        if name.startswith(prefix):
            block.variable(name.removeprefix(prefix)).assign(weights[name])
    return block


def run_block(block: GemmaDecoderBlock, x: np.ndarray) -> None:
    """Replace each row of `x`, float32 `(batch, length, hidden_dim)`, by the block's output."""
    for row in range(len(x)):
        out = block(ops.convert_to_tensor(x[row : row + 1], dtype="float32"))
        x[row] = np.asarray(ops.convert_to_numpy(ops.stop_gradient(out)))[0]


def head_logits(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    hidden: np.ndarray,
    tokens: np.ndarray | None = None,
) -> np.ndarray:
    """Logits of what the last block returned.

    Args:
        config: the model's.
        weights: canonical name to float array.
        hidden: float32 `(n, hidden_dim)`.
        tokens: ids whose logits are wanted; all by default.

    Returns:
        float32 `(n, vocabulary_size)`, or as many columns as tokens.
    """
    scale = 1 + weights["final_norm"].astype(np.float32)
    mean_square = np.mean(hidden * hidden, axis=-1, keepdims=True)
    normed = hidden / np.sqrt(mean_square + np.float32(config.norm_epsilon)) * scale
    table = weights["token_embedding" if config.tied_head else "head"]
    if tokens is not None:
        table = table[tokens]
    logits = np.empty((len(hidden), len(table)), np.float32)
    step = max(1, _VOCABULARY_BYTES // (4 * config.hidden_dim))
    for first in range(0, len(table), step):
        piece = np.asarray(table[first : first + step], np.float32)
        logits[:, first : first + step] = normed @ piece.T
    if config.final_soft_cap is not None:
        cap = np.float32(config.final_soft_cap)
        logits = np.tanh(logits / cap) * cap
    return logits


def reference_logits(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    ids: np.ndarray,
    positions: np.ndarray,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Logits of the float model.

    Args:
        config: the model's.
        weights: canonical name to float array.
        ids: `(batch, length)`.
        positions: of each row, those whose logits are wanted.
        on_progress: told the blocks done and those in all.

    Returns:
        float32 `(batch * len(positions), vocabulary_size)`, row after row.
    """
    x = embedded(config, weights, ids)
    for i in range(len(config.layers)):
        run_block(load_block(config, weights, i), x)
        on_progress(i + 1, len(config.layers))
    return head_logits(config, weights, x[:, positions].reshape(-1, config.hidden_dim))
