"""Runs the float model one decoder block at a time, as the reference for exports.

It uses the Keras layers with only one block in memory. So a laptop can run a model of any size, for
many tokens at once.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping

import numpy as np
from keras import ops

from gemma_keras.checkpoints.names import head_table, weight_specs
from gemma_keras.checkpoints.source import table_chunks
from gemma_keras.config import GemmaConfig, LayerSpec
from gemma_keras.model.layers import GemmaDecoderBlock

_WORTH_COLLECTING = 64 << 20  # bytes of a block


def embedded(config: GemmaConfig, weights: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Returns the input of the first block for ids `(batch, length)`: float32 `(batch, length,
    hidden_dim)`."""
    tokens, places = np.unique(ids, return_inverse=True)
    rows = table_rows(config, weights, "token_embedding", tokens)
    return rows[places.reshape(ids.shape)] * np.float32(config.embedding_scale)


def table_rows(
    config: GemmaConfig, weights: Mapping[str, np.ndarray], name: str, tokens: np.ndarray
) -> np.ndarray:
    """Rows of a table, float32 `(len(tokens), hidden_dim)`, of ids in ascending order."""
    rows = np.empty((len(tokens), config.hidden_dim), np.float32)
    for first, chunk in table_chunks(weights, name):
        here = slice(*np.searchsorted(tokens, (first, first + len(chunk))))
        rows[here] = chunk[tokens[here] - first]
    return rows


class BlockLoader:
    """Decoder blocks in float32, one of them in memory at a time.

    Args:
        config: the model's.
        weights: canonical name to float array.
    """

    def __init__(self, config: GemmaConfig, weights: Mapping[str, np.ndarray]) -> None:
        self._config = config
        self._weights = weights
        self._kind: LayerSpec | None = None
        self._block: GemmaDecoderBlock | None = None

    def load(self, i: int) -> GemmaDecoderBlock:
        """Block `i` with its weights; the block that was loaded before is not to be used again."""
        config, kind = self._config, self._config.layers[i]
        if self._block is None or kind != self._kind:
            self._block = None
            if self._block_bytes(i) > _WORTH_COLLECTING:
                gc.collect()  # layers are parts of cycles, which only the collector frees
            block = GemmaDecoderBlock(
                kind, config.hidden_dim, config.norm_epsilon, "zeros", dtype="float32"
            )
            block.build((1, 1, config.hidden_dim))
            self._kind = kind
        else:
            block = self._block
        prefix = f"layers.{i}."
        for name in weight_specs(config):
            if name.startswith(prefix):
                block.variable(name.removeprefix(prefix)).assign(self._weights[name])
        self._block = block
        return block

    def _block_bytes(self, i: int) -> int:
        specs = weight_specs(self._config)
        of_block = (spec for name, spec in specs.items() if name.startswith(f"layers.{i}."))
        return sum(4 * math.prod(spec.shape) for spec in of_block)


def run_block(block: GemmaDecoderBlock, x: np.ndarray) -> None:
    """Replace each row of `x`, float32 `(batch, length, hidden_dim)`, by the block's output."""
    for row in range(len(x)):
        out = block(ops.convert_to_tensor(x[row : row + 1], dtype="float32"))
        x[row] = np.asarray(ops.convert_to_numpy(ops.stop_gradient(out)))[0]


def head_logits(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    hidden: np.ndarray,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Computes the logits of the last block's output.

    Args:
        config: the model's.
        weights: canonical name to float array.
        hidden: float32 `(n, hidden_dim)`.
        rows: of the head's table, for the tokens whose logits are needed; all by default.

    Returns:
        float32 `(n, vocabulary_size)`, or as many columns as rows.
    """
    scale = 1 + weights["final_norm"].astype(np.float32)
    mean_square = np.mean(hidden * hidden, axis=-1, keepdims=True)
    normed = hidden / np.sqrt(mean_square + np.float32(config.norm_epsilon)) * scale
    if rows is not None:
        logits = normed @ rows.T
    else:
        logits = np.empty((len(hidden), config.vocabulary_size), np.float32)
        for first, chunk in table_chunks(weights, head_table(config)):
            logits[:, first : first + len(chunk)] = normed @ chunk.T
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
        positions: in each row, whose logits are needed.
        on_progress: called with (blocks done, all of them).

    Returns:
        float32 `(batch * len(positions), vocabulary_size)`, row after row.
    """
    x = embedded(config, weights, ids)
    blocks = BlockLoader(config, weights)
    for i in range(len(config.layers)):
        run_block(blocks.load(i), x)
        on_progress(i + 1, len(config.layers))
    return head_logits(config, weights, x[:, positions].reshape(-1, config.hidden_dim))
