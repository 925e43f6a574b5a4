"""Makes the quality report of a model card: compares a bundle with the float model on a user's
text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.errors import EdgeError
from edge_demo.evaluate.compare import compare
from export.calibrate.reference import BlockLoader, embedded, head_logits, run_block
from export.calibrate.text import Windows
from export.errors import ExportError
from gemma_keras.checkpoints.source import Checkpoint

_CHUNK = 64  # positions whose logits are yielded at once, as `Engine.all_logits` does


class _FloatModel:
    """The float model as `edge_demo.evaluate.compare` takes it, run block by block over all windows
    first.

    Args:
        checkpoint: the model.
        rows: the windows, int `(windows, length)`.
        on_progress: called with (blocks done, all of them).
    """

    def __init__(
        self, checkpoint: Checkpoint, rows: np.ndarray, on_progress: Callable[[int, int], None]
    ) -> None:
        self._checkpoint = checkpoint
        config, weights = checkpoint.config, checkpoint.weights
        self.context_length = config.context_length
        self._hidden = embedded(config, weights, rows)
        blocks = BlockLoader(config, weights)
        for i in range(len(config.layers)):
            run_block(blocks.load(i), self._hidden)
            on_progress(i + 1, len(config.layers))
        self._number = {row.tobytes(): number for number, row in enumerate(rows)}

    def rewind(self, length: int) -> None:
        """Does nothing, because every window is a separate text."""

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the logits of one window: float32 `(chunk, vocabulary_size)`, one row for each
        id."""
        hidden = self._hidden[self._number[np.asarray(ids, np.int32).tobytes()]]
        # All at once: the head's table is read, and perhaps dequantized, for every call.
        logits = head_logits(self._checkpoint.config, self._checkpoint.weights, hidden)
        for first in range(0, len(ids), _CHUNK):
            yield logits[first : first + _CHUNK]


def measure_on_text(
    bundle: Bundle, checkpoint: Checkpoint, text: Windows, on_progress: Callable[[float], None]
) -> dict[str, Any]:
    """Returns what `edge-demo compare --json` would print for a bundle and its float32 reference.

    Args:
        bundle: to compare.
        checkpoint: that it was made from.
        text: to compare on.
        on_progress: called with the share that is done.

    Returns:
        `comparison` and `text`, as `export.bundle.card.write_card` takes them.

    Raises:
        ExportError: the bundle does not run.
    """

    def second_half(done: int, total: int) -> None:
        on_progress((1 + done / total) / 2)

    reference = _FloatModel(
        checkpoint, text.rows, lambda done, total: on_progress(done / total / 2)
    )
    try:
        (found,) = compare(
            reference, [Engine(bundle)], text.bos, text.ids, text.length, text.count, second_half
        )
    except EdgeError as error:
        raise ExportError(f"the exported model does not run: {error}") from error
    who = {
        "reference": {"name": bundle.name, "recipe": "fp32"},
        "bundle": {"name": bundle.name, "recipe": bundle.recipe},
    }
    return {"comparison": who | dataclasses.asdict(found), "text": text.name}
