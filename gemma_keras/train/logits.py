"""Logits of a model that is not trained, wherever a token of an example is to be predicted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from keras import ops

from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.model.token_loss import tokens_of_chunk
from gemma_keras.train.examples import Example

_ROUND = 64  # lengths are multiples of it: fewer shapes to compile


def log_mass(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The logarithm of what all exponentials add up to, by which log-probabilities are less.

    Args:
        logits: float32 `(positions, vocabulary_size)`.
        temperature: by which they are divided.

    Returns:
        float64 `(positions,)`.
    """
    greatest = logits.max(axis=-1)
    exponentials = np.exp((logits - greatest[:, None]) / np.float32(temperature))
    return np.log(exponentials.sum(axis=-1, dtype=np.float64)) + greatest / float(temperature)


def logits_of_keras(model: GemmaCausalLM, example: Example) -> Iterator[np.ndarray]:
    """The logits of a text, in chunks of bounded size.

    Args:
        model: any; the preprocessor is not used.
        example: of one text.

    Yields:
        float32 `(chunk, vocabulary_size)`, together one row for each token that counts.
    """
    length = example.inputs
    wide = -(-length // _ROUND) * _ROUND
    ids, mask = np.zeros((1, wide), np.int32), np.zeros((1, wide), np.int32)
    ids[0, :length], mask[0, :length] = example.ids[:-1], 1
    hidden = model.backbone.predict({"token_ids": ids, "padding_mask": mask}, verbose=0)
    hidden = hidden[0, :length][example.counts[1:]]
    embedding = model.backbone.token_embedding
    step = tokens_of_chunk(embedding)
    for first in range(0, len(hidden), step):
        part = ops.convert_to_tensor(hidden[None, first : first + step])
        logits = ops.cast(embedding(part, reverse=True), "float32")
        yield ops.convert_to_numpy(ops.stop_gradient(logits))[0]
