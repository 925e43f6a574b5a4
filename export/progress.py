"""Shows the progress of an export on stderr."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_STAGES = {
    "opening": "opening the checkpoint",
    "keras": "starting Keras",
    "fingerprint": "reading the weights",
    "self-sampling": "generating calibration text",
    "calibration": "calibrating the blocks",
    "sensitivity": "measuring the loss of each matrix",
    "reference": "running the float model",
    "measuring": "measuring the quantized model",
    "weights": "storing the weights",
    "graphs": "writing the graphs",
    "keys and values": "measuring keys and values",
    "verification": "comparing with the Keras layers",
    "report": "measuring on the text of the report",
}


class ShowProgress:
    """A context manager that shows one progress bar per stage on a terminal, otherwise one line per
    stage.

    Called with a stage and the share of it that is done.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._task: TaskID | None = None
        self._bars: Progress | None = None
        if sys.stderr.isatty():
            self._bars = Progress(
                TextColumn("{task.description:<32}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                # its own copy of stderr: native libraries' is kept back while they load
                console=Console(file=os.fdopen(os.dup(2), "w", encoding="utf-8")),
            )

    def __enter__(self) -> ShowProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._finish()
        if self._bars:
            self._bars.stop()

    def stage(self, name: str) -> None:
        """Begin a stage, and end the one before."""
        self(name, 0.0)

    def __call__(self, stage: str, share: float) -> None:
        if stage != self._stage:
            self._finish()
            self._stage = stage
            label = _STAGES.get(stage, stage)
            if self._bars:
                self._task = self._bars.add_task(label, total=1.0)
            else:
                print(f"{label} …", file=sys.stderr, flush=True)
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=share)

    def _finish(self) -> None:
        if self._bars and self._task is not None:
            self._bars.update(self._task, completed=1.0)
        self._task = None
