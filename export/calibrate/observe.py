"""Observes the inputs of each matrix, with one decoder block in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
from keras import ops

from export.calibrate.input_statistics import InputStatistics, MomentSum
from export.calibrate.reference import BlockLoader, run_block
from export.formats.fused_matrices import SAME_INPUT
from gemma_keras.config import GemmaConfig
from gemma_keras.model.layers import GemmaDecoderBlock

# Matrices that see the same inputs, by the first of them, which is the one that is watched.
OBSERVED = {names[0]: names for names in SAME_INPUT}


def observe(
    config: GemmaConfig, weights: Mapping[str, np.ndarray], x: np.ndarray, first_block: int = 0
) -> Iterator[dict[str, InputStatistics]]:
    """Observe the inputs of each block's matrices on one text.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        x: what block `first_block` sees, float32 `(batch, length, hidden_dim)`; replaced in place
            by what it returns, block after block.
        first_block: the block to begin with.

    Yields:
        For each block: name within the block, of `OBSERVED`, to the statistics.
    """
    blocks = BlockLoader(config, weights)
    for i in range(first_block, len(config.layers)):
        block = blocks.load(i)
        with _watch(block) as sums:
            run_block(block, x)
        yield {name: total.mean() for name, total in sums.items()}


@contextlib.contextmanager
def _watch(block: GemmaDecoderBlock) -> Iterator[dict[str, MomentSum]]:
    sums = {name: MomentSum() for name in OBSERVED}

    def watch(name: str) -> None:
        dense = block.sublayer(name)
        call = dense.call

        def observed(inputs, *args, **kwargs):
            sums[name].add(np.asarray(ops.convert_to_numpy(inputs), np.float32))
            return call(inputs, *args, **kwargs)

        dense.call = observed

    for name in OBSERVED:
        watch(name)
    try:
        yield sums
    finally:
        for name in OBSERVED:
            del block.sublayer(name).call  # the method of its class is there again
