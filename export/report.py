"""The quality report of a model card: a bundle against the float model, on a text of one's own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_demo.bundle import Bundle
from edge_demo.compare import compare
from edge_demo.engine import Engine
from edge_demo.errors import EdgeError, RequestError
from edge_demo.tokenizer import Tokenizer
from export.errors import ExportError, ExportRequestError
from export.quantize.text import read_text
from export.reference import BlockLoader, embedded, head_logits, run_block
from gemma_keras.checkpoints import Checkpoint

WINDOW, MOST_WINDOWS = 512, 24
_CHUNK = 64  # positions whose logits are in memory at once, as `Engine.all_logits` has it


class _FloatModel:
    """The float model as `edge_demo.compare` takes it, run block by block over all windows first.

    Args:
        checkpoint: the model.
        windows: int `(windows, length)`, in the order in which they will be asked for.
        on_progress: told the blocks done and those in all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: np.ndarray,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._checkpoint = checkpoint
        config, weights = checkpoint.config, checkpoint.weights
        self.context_length = config.context_length
        self._hidden = embedded(config, weights, windows)
        blocks = BlockLoader(config, weights)
        for i in range(len(config.layers)):
            run_block(blocks.load(i), self._hidden)
            on_progress(i + 1, len(config.layers))
        self._windows = {window.tobytes(): row for row, window in enumerate(windows)}

    def rewind(self, length: int) -> None:
        """Nothing to forget: every window is a whole text."""

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Of one of the windows: float32 `(chunk, vocabulary_size)`, one row for each id."""
        hidden = self._hidden[self._windows[np.asarray(ids, np.int32).tobytes()]]
        for first in range(0, len(ids), _CHUNK):
            chunk = hidden[first : first + _CHUNK]
            yield head_logits(self._checkpoint.config, self._checkpoint.weights, chunk)


def measure_on_text(
    bundle: Bundle,
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    on_progress: Callable[[float], None],
) -> dict[str, Any]:
    """What `edge-demo compare --json` would print of a bundle and its float32 reference.

    Args:
        bundle: to judge.
        checkpoint: what it was made from.
        path: a UTF-8 text; at most 24 windows of 512 tokens of it are used.
        on_progress: told the share that is done.

    Returns:
        `comparison` and `text`, as `export.card.write_card` takes them.

    Raises:
        ExportRequestError: the text cannot be read, or fills no window.
        ExportError: the bundle does not run.
    """
    text = read_text(Path(path), "text of the report")
    tokenizer = Tokenizer(bundle)
    ids = tokenizer.encode(text, bos=False)
    length = min(WINDOW, bundle.context_length)
    room = length - 1
    count = min((len(ids) - 1) // room if ids else 0, MOST_WINDOWS)
    if count < 1:
        raise ExportRequestError(
            f"the text of the report {path} has {len(ids)} tokens; {length} are needed"
        )
    windows = np.full((count, length), tokenizer.spec.bos, np.int32)
    windows[:, 1:] = np.reshape(ids[: count * room], (count, room))
    half = 0.5
    reference = _FloatModel(
        checkpoint, windows, lambda done, total: on_progress(half * done / total)
    )
    try:
        (found,) = compare(
            reference,
            [Engine(bundle)],
            tokenizer.spec.bos,
            ids,
            length,
            count,
            lambda done, total: on_progress(half + half * done / total),
        )
    except RequestError as error:
        raise ExportRequestError(f"{path}: {error}") from error
    except EdgeError as error:
        raise ExportError(f"the exported model does not run: {error}") from error
    comparison: Mapping[str, Any] = dataclasses.asdict(found)
    who = {
        "reference": {"name": bundle.name, "recipe": "fp32"},
        "bundle": {"name": bundle.name, "recipe": bundle.recipe},
    }
    return {"comparison": who | dict(comparison), "text": Path(path).name}
