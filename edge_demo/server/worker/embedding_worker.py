"""The thread that owns an embedder: it runs one batch of texts of each request in turn.

So a request of thousands of texts does not keep one of a single text waiting.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edge_demo.engine.embedder import Embedder
from edge_demo.server.worker.worker import BusyError, ClosedError


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
        self.vectors = np.empty((len(job.rows), embedder.spec.dimensions), np.float32)
        self.steps: Iterator[tuple[list[int], np.ndarray]] = embedder.in_steps(job.rows)


class EmbeddingWorker:
    """Answers jobs on one embedder.

    Args:
        embedder: that runs them.
        queue: how many jobs there may be, those that have begun included.

    Attributes:
        counts: numbers since the start, by name.
    """

    def __init__(self, embedder: Embedder, queue: int) -> None:
        self._embedder = embedder
        self._queue = queue
        self._waiting: collections.deque[EmbeddingJob] = collections.deque()
        self._running: collections.deque[_Running] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._since = 0.0  # when the present step began
        self.counts: dict[str, int] = dict.fromkeys(
            ("requests", "refused", "failures", "texts", "prompt_tokens"), 0
        )
        self._thread = threading.Thread(target=self._work, name="embedder", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: EmbeddingJob) -> None:
        """Let a job wait for its turn.

        Raises:
            BusyError: too many wait already.
            ClosedError: it is being closed.
            RequestError, TooLittleMemoryError: as `Embedder.check`.
        """
        self._embedder.check(job.rows)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise ClosedError
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

    def close(self) -> None:
        """End when all jobs have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    @property
    def stalled_s(self) -> float:
        """Seconds since it began its present batch; 0 while it has nothing to do."""
        return time.monotonic() - self._since if self._since else 0.0

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
            except Exception as error:  # such as onnxruntime's, out of memory: the next may fit
                self.counts["failures"] += 1
                found = error
            else:
                if step is not None:
                    members, vectors = step
                    running.vectors[members] = vectors
                    self.counts["texts"] += len(members)
                    self.counts["prompt_tokens"] += sum(len(job.rows[i]) for i in members)
                    self._running.rotate(-1)
                    return
                found = running.vectors
        with self._changed:
            self._running.popleft()
        if found is not None:
            job.tell(found)
