"""The thread that owns an embedder: it runs one batch of texts of each request in turn.

So a request of thousands of texts does not keep one of a single text waiting.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edge_demo.engine.embedder import Embedder
from edge_demo.server.worker.owner import BusyError, EngineOwner


class EmbeddingJob:
    """Texts of one request.

    Args:
        rows: token ids of each text.
        tell: called once, in the worker's thread: with the vectors, float32
            `(len(rows), dimensions)`, or with what went wrong.

    Attributes:
        cancelled: whether nobody waits for it any more.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], tell: Callable[[np.ndarray | Exception], None]
    ) -> None:
        self.rows = rows
        self.tell = tell
        self.cancelled = False


class _Running:
    """A job that has begun."""

    def __init__(self, job: EmbeddingJob, embedder: Embedder) -> None:
        self.job = job
        self.steps: Iterator[tuple[list[int], np.ndarray]] = embedder.in_steps(job.rows)
        self._embedder = embedder
        self._vectors: np.ndarray | None = None

    @property
    def vectors(self) -> np.ndarray:
        """Of all rows; made when the first come."""
        if self._vectors is None:
            shape = len(self.job.rows), self._embedder.spec.dimensions
            self._vectors = np.empty(shape, np.float32)
        return self._vectors


class EmbeddingWorker(EngineOwner):
    """Answers jobs on one embedder.

    Args:
        embedder: that runs them.
        queue: how many jobs there may be, those that have begun included.

    Attributes:
        counts: numbers since the start, by name.
    """

    def __init__(self, embedder: Embedder, queue: int) -> None:
        super().__init__("embedder")
        self._embedder = embedder
        self._queue = queue
        self._waiting: collections.deque[EmbeddingJob] = collections.deque()
        self._running: collections.deque[_Running] = collections.deque()
        self.counts: dict[str, int] = dict.fromkeys(
            ("requests", "refused", "failures", "texts", "prompt_tokens"), 0
        )

    def submit(self, job: EmbeddingJob) -> None:
        """Let a job wait for its turn.

        Raises:
            BusyError: too many wait already.
            ClosedError: it is being closed.
            RequestError, TooLittleMemoryError: as `Embedder.check`.
        """
        self._embedder.check(job.rows)
        with self._changed:
            self._check_open()
            if len(self._waiting) + len(self._running) >= self._queue:
                self.counts["refused"] += 1
                raise BusyError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: EmbeddingJob) -> None:
        """Give a job up; it ends before its next batch."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    @property
    def state(self) -> dict[str, int]:
        """What it does now, by name."""
        return {"waiting": len(self._waiting), "running": len(self._running)}

    def _work(self) -> None:
        while self._wait():
            self._since = time.monotonic()
            self._step()

    def _wait(self) -> bool:
        """Take what waits, and sleep while there is nothing to do; `False` at the end."""
        with self._changed:
            while not (self._waiting or self._running):
                self._since = 0.0
                if self._closing:
                    return False
                self._changed.wait()
            while self._waiting:
                job = self._waiting.popleft()
                self.counts["requests"] += 1
                self._running.append(_Running(job, self._embedder))
        return True

    def _step(self) -> None:
        """Run one batch of the job whose turn it is."""
        running = self._running[0]
        job, found = running.job, None
        if not job.cancelled:
            try:
                step = next(running.steps, None)
                if step is not None:
                    running.vectors[step[0]] = step[1]
            except Exception as error:  # such as onnxruntime's, out of memory: the next may fit
                self.counts["failures"] += 1
                found = error
            else:
                if step is not None:
                    self.counts["texts"] += len(step[0])
                    self.counts["prompt_tokens"] += sum(len(job.rows[i]) for i in step[0])
                    self._running.rotate(-1)
                    return
                found = running.vectors
        with self._changed:
            self._running.popleft()
        if found is not None:
            job.tell(found)
