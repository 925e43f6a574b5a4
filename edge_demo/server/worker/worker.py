"""The thread that owns the engine: it runs prompts in pieces and answers rows at once.

Between two pieces of a long prompt, each answer that grows gets a token. Between two tokens,
prompts join and answers leave.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from edge_demo.engine.kv_cache import Snapshot
from edge_demo.engine.prefixes import PrefixStore
from edge_demo.engine.prompt_chunks import UNIT
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import EdgeError, RequestError
from edge_demo.server.worker.job import Failed, Job, Reading
from edge_demo.server.worker.owner import BusyError, EngineOwner
from edge_demo.server.worker.rows import Rows
from edge_demo.text.generator import candidates_suffice
from edge_demo.text.tokenizer import Tokenizer

_FEWEST_KEPT = UNIT  # tokens of a prompt that is worth to be kept


class _Reading:
    """A prompt that is being run."""

    def __init__(self, job: Job, begin: float, steps: Iterator[int], kept_at: int) -> None:
        self.job = job
        self.begin = begin
        self.steps = steps
        self.kept_at = kept_at


class _Beginning(NamedTuple):
    """What a conversation's next prompt will begin with."""

    namespace: str
    make: Callable[[], list[int]]


class Worker(EngineOwner):
    """Answers jobs on one engine.

    Args:
        engine: that runs prompts and, with its own graph, answers.
        tokenizer: of the same bundle.
        rows: how many answers grow at once, one of `SIZES`.
        queue: how many jobs may wait.
        cache_bytes: that keys and values of earlier prompts may take.
        threads: as of `Engine`, for the graph of all logits.
        force: as of `Engine`, for the graph of all logits.

    Attributes:
        counts: numbers since the start, by name.
    """

    def __init__(
        self,
        engine: Engine | CandidateEngine,
        tokenizer: Tokenizer,
        rows: int,
        queue: int,
        cache_bytes: int,
        threads: int | None = None,
        force: bool = False,
    ) -> None:
        super().__init__("engine")
        self._engine = engine
        self._tokenizer = tokenizer
        self._most = rows
        self._queue = queue
        self._settings = threads, force
        self._other: Engine | None = None
        self._prefixes = PrefixStore(cache_bytes)
        self._namespace = ""  # of what the engine holds
        self._of_candidates = Rows(engine, tokenizer, rows, self._all_logits, self._ended)
        self._of_all = self._of_candidates if isinstance(engine, Engine) else None
        self._waiting: collections.deque[Job] = collections.deque()
        self._reading: _Reading | None = None
        self._beginnings: collections.deque[_Beginning] = collections.deque(maxlen=rows)
        self._ahead: Iterator[int] | None = None  # a beginning that is being run
        self.counts: dict[str, int] = dict.fromkeys(
            (
                *("requests", "refused", "failures"),
                *("prompt_tokens", "cached_tokens", "completion_tokens"),
            ),
            0,
        )

    def submit(self, *jobs: Job) -> None:
        """Let jobs wait for their turn, all of them or none.

        Raises:
            BusyError: too many wait already.
            ClosedError: it is being closed.
            RequestError: a prompt does not fit the context, or they could never wait at once.
        """
        if len(jobs) > self._queue:
            raise RequestError(
                f"this request needs {len(jobs):,} answers, but at most {self._queue:,} can wait"
            )
        for job in jobs:
            self._engine.check(job.ids)
        with self._changed:
            self._check_open()
            if len(self._waiting) + len(jobs) > self._queue:
                self.counts["refused"] += len(jobs)
                raise BusyError
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, *jobs: Job) -> None:
        """Give jobs up; what they take is free before the next token."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self._waiting:  # its place in the queue is another's
                    self._waiting.remove(job)

    @property
    def state(self) -> dict[str, int]:
        """What it does now, by name."""
        return {
            "waiting": len(self._waiting),
            "reading": int(self._reading is not None),
            "reading_ahead": len(self._beginnings) + int(self._ahead is not None),
            "answering": self._answering,
            "cache_bytes": self._prefixes.num_bytes,
            "cache_entries": len(self._prefixes),
        }

    @property
    def _answering(self) -> int:
        other = self._of_all if self._of_all is not self._of_candidates else None
        return len(self._of_candidates) + (len(other) if other else 0)

    def _work(self) -> None:
        while self._wait():
            self._since = time.monotonic()
            try:
                if not self._busy:
                    self._read_ahead()
                    continue
                self._ahead = None  # the engine is needed
                self._read()
                self._answer()
            except Exception as error:  # such as onnxruntime's, out of memory: the next may fit
                self._fail(error)

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; `False` at the end."""
        with self._changed:
            while not self._busy:
                self._since = 0.0
                if self._closing:
                    return False
                if self._ahead or self._beginnings:
                    return True
                self._changed.wait()
        return True

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._reading or self._answering)

    # --- prompts ---------------------------------------------------------------------------------

    def _read(self) -> None:
        """Run one piece of a prompt, if there is one and a row for its answer."""
        reading = self._reading or self._next()
        if reading is None:
            return
        job, self._reading = reading.job, reading
        if job.cancelled:
            self._reading = None
            return
        done = next(reading.steps, None)
        if done is not None and done < len(job.ids) - 1:
            if done == reading.kept_at:
                self._prefixes.keep(job.namespace, self._engine)
            job.tell(Reading(done, len(job.ids)))
            return
        if len(job.ids) > _FEWEST_KEPT:
            self._prefixes.keep(job.namespace, self._engine)
        self._rows_for(job).join(job, self._engine.snapshot(), reading.begin)
        self._reading = None

    def _next(self) -> _Reading | None:
        while self._answering < self._most:
            with self._changed:
                if not self._waiting:
                    return None
                job = self._waiting.popleft()
            if job.cancelled:
                continue
            try:
                return self._begin(job)
            except RequestError as error:
                job.tell(Failed(error))
            except Exception as error:
                job.tell(Failed(error))
                raise
        return None

    def _begin(self, job: Job) -> _Reading:
        begin, before = time.perf_counter(), job.ids[:-1]
        self._rows_for(job)  # which may not fit into memory
        self._restore_best(job.namespace, before)
        kept_at = job.shared // UNIT * UNIT
        steps = self._engine.hold_in_steps(before, self._piece, kept_at)
        job.completion.reused_tokens = next(steps)
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += len(job.ids)
        self.counts["cached_tokens"] += job.completion.reused_tokens
        return _Reading(job, begin, steps, kept_at)

    def _restore_best(self, namespace: str, ids: list[int]) -> None:
        """Have the engine hold what saves most of running a prompt, of one namespace alone."""
        if self._namespace != namespace:
            self._engine.rewind(0)
            self._namespace = namespace
        saved, snapshot = self._prefixes.best(namespace, self._engine, ids)
        if snapshot and saved > self._engine.saved_by(self._engine.snapshot(), ids):
            self._engine.restore(snapshot)

    def _piece(self) -> int:
        """The most tokens of a piece: few where answers wait for it."""
        return UNIT if self._answering else 8 * UNIT

    def _ended(self, job: Job) -> None:
        """Note what a conversation may go on with."""
        if job.next_beginning is not None and self._prefixes.most_bytes:
            make = functools.partial(job.next_beginning, job.completion.text)
            self._beginnings.append(_Beginning(job.namespace, make))

    def _read_ahead(self) -> None:
        """Run one piece of what a next prompt will begin with."""
        if self._ahead is None:
            beginning = self._beginnings.popleft()
            ids = beginning.make()
            ids = ids[: len(ids) // UNIT * UNIT]
            if not ids or len(ids) > self._engine.context_length:
                return
            self._restore_best(beginning.namespace, ids)
            self._ahead = self._engine.hold_in_steps(ids, lambda: UNIT)
        if next(self._ahead, None) is None:
            self._ahead = None
            self._prefixes.keep(self._namespace, self._engine)

    # --- answers ---------------------------------------------------------------------------------

    def _rows_for(self, job: Job) -> Rows:
        """Those of the graph whose outputs the job needs.

        Raises:
            RequestError: the graph of all logits does not fit into memory.
        """
        if self._of_all is self._of_candidates or not self._needs_all(job):
            return self._of_candidates
        if self._of_all is None:
            engine = self._engine_of_all()
            self._of_all = Rows(engine, self._tokenizer, self._most, self._all_logits, self._ended)
        return self._of_all

    def _engine_of_all(self) -> Engine:
        """One that returns the logits of all tokens.

        Raises:
            RequestError: it does not fit into memory.
        """
        if isinstance(self._engine, Engine):
            return self._engine
        if self._other is None:
            threads, force = self._settings
            try:
                self._other = Engine(self._engine.bundle, threads, self._most, force)
            except EdgeError as error:
                raise RequestError(
                    f"this request needs the logits of all tokens, but {error}"
                ) from None
        return self._other

    def _all_logits(self, snapshot: Snapshot) -> np.ndarray:
        """Those after the last token of a text; errors as `_engine_of_all`."""
        engine = self._engine_of_all()
        engine.restore(snapshot)
        engine.rewind(len(snapshot.tokens) - 1)
        return engine.decode(snapshot.tokens[-1])

    def _needs_all(self, job: Job) -> bool:
        lowered = 0 if job.bias is None else job.bias.lowered
        if job.top is not None or lowered is None:
            return True
        return not candidates_suffice(self._engine.bundle, job.sampler, self._tokenizer, lowered)

    def _answer(self) -> None:
        """Add a token to each answer."""
        for rows in {id(r): r for r in (self._of_candidates, self._of_all) if r}.values():
            # While a prompt is read, the engine holds a part of it.
            if self._reading is None and rows.catch_up(self._engine):
                self._engine.rewind(0)  # that text may be of another namespace
            self.counts["completion_tokens"] += rows.step()

    def _fail(self, error: Exception) -> None:
        self.counts["failures"] += 1
        for rows in (self._of_candidates, self._of_all):
            if rows is not None:
                rows.fail(error)
        if self._reading is not None:
            self._reading.job.tell(Failed(error))
            self._reading = None
        self._ahead = None
        self._beginnings.clear()
        self._prefixes.clear()
        self._engine.rewind(0)
