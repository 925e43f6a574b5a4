"""Answers that grow together, a row of the batch decoder each."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from edge_demo.engine.batch_decoder import SIZES, BatchDecoder
from edge_demo.engine.candidates import Candidates
from edge_demo.engine.kv_cache import Snapshot
from edge_demo.engine.prompt_chunks import PromptRun
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import EdgeError
from edge_demo.server.worker.job import Ended, Failed, Job, Piece
from edge_demo.text.answer import Writer
from edge_demo.text.grammar import NoCandidateError
from edge_demo.text.log_probabilities import TokenLogProb, log_probability
from edge_demo.text.tokenizer import Tokenizer

_FEWEST_AT_ONCE = 3  # forced tokens that are worth to be moved to the engine and back


class _Row:
    """An answer as it grows."""

    def __init__(
        self,
        job: Job,
        tokenizer: Tokenizer,
        context: int,
        begin: float,
        on_end: Callable[[Job], None],
    ) -> None:
        self.job = job
        self._on_end = on_end
        self.pending = [job.ids[-1]]  # tokens that were chosen, but not run
        self._begin = begin
        self._first = 0.0
        self._tokenizer = tokenizer
        self._writer = Writer(
            job.completion,
            tokenizer,
            job.sampler,
            job.max_tokens,
            context,
            job.stop,
            job.bias,
            job.grammar,
        )

    def add(self, logits: np.ndarray | Candidates) -> bool:
        """Choose the next token and tell it; `False` where the answer has ended.

        Raises:
            NoCandidateError: as `Writer.add`.
        """
        out = self.job.completion
        try:
            text = self._writer.add(logits)
        except NoCandidateError:
            raise
        except EdgeError as error:  # of this answer alone: its logits, or its grammar
            self.job.tell(Failed(error))
            return False
        now = time.perf_counter()
        self._first = self._first or now
        out.prefill_s, out.decode_s = self._first - self._begin, now - self._first
        if text is not None:
            self.job.tell(Piece(text, self._logprob(logits)))
            count = len(out.ids)
            if self.job.top is None and (forced := self._writer.add_forced()):
                self.job.tell(Piece(forced))
            self.pending = out.ids[count - 1 :]
        if out.finish_reason == "interrupted":
            return True
        if rest := self._writer.finish():
            self.job.tell(Piece(rest))
        self.job.tell(Ended())
        self._on_end(self.job)
        return False

    def _logprob(self, logits: np.ndarray | Candidates) -> TokenLogProb | None:
        if self.job.top is None or not isinstance(logits, np.ndarray):
            return None
        known = logits[: self._tokenizer.num_pieces]
        return log_probability(known, self.job.completion.ids[-1], self.job.top)


class Rows:
    """Some answers over one engine's session; they join and leave between two tokens.

    Args:
        engine: whose graph and weights are run.
        tokenizer: of the same bundle.
        most: how many there may be at once, one of `SIZES`.
        all_logits: returns those after the last token of a text; it may refuse with a
            `RequestError`.
        on_end: called with each job whose answer is whole.
    """

    def __init__(
        self,
        engine: Engine | CandidateEngine,
        tokenizer: Tokenizer,
        most: int,
        all_logits: Callable[[Snapshot], np.ndarray],
        on_end: Callable[[Job], None],
    ) -> None:
        self._all_logits = all_logits
        self._on_end = on_end
        self._context = engine.context_length
        self._tokenizer = tokenizer
        self._decoder = BatchDecoder(engine, most)
        self._rows: list[_Row] = []

    def __len__(self) -> int:
        """How many answers grow."""
        return len(self._rows)

    def join(self, job: Job, snapshot: Snapshot, begin: float) -> None:
        """Begin an answer.

        Args:
            job: whose prompt it is.
            snapshot: of an engine that holds the prompt but its last token.
            begin: when the prompt was begun, by `time.perf_counter`.
        """
        row = _Row(job, self._tokenizer, self._context, begin, self._on_end)
        self._decoder.put(len(self._rows), snapshot)
        self._rows.append(row)

    def step(self) -> int:
        """Add a token to each answer; those that end, and cancelled ones, leave.

        Returns:
            How many tokens were chosen.
        """
        for place in reversed(range(len(self._rows))):
            if self._rows[place].job.cancelled:
                self._leave(place)
        if not self._rows:
            return 0
        size = next(size for size in SIZES if size >= len(self._rows))
        tokens = {place: row.pending.pop(0) for place, row in enumerate(self._rows)}
        outputs = self._decoder.decode(tokens, size)
        chosen = {place: row for place, row in enumerate(self._rows) if not row.pending}
        before = sum(len(row.job.completion.ids) for row in chosen.values())
        ended = [p for p, row in chosen.items() if not self._add(p, row, outputs[p])]
        for place in reversed(ended):
            self._leave(place)
        return sum(len(row.job.completion.ids) for row in chosen.values()) - before

    def _add(self, place: int, row: _Row, logits: np.ndarray | Candidates) -> bool:
        """As `_Row.add`, with all logits where no candidate is allowed."""
        try:
            return row.add(logits)
        except NoCandidateError:
            pass
        tokens = [*row.job.ids, *row.job.completion.ids]
        snapshot = Snapshot(tokens, self._decoder.filled(place), PromptRun())
        try:
            return row.add(self._all_logits(snapshot))
        except EdgeError as error:
            row.job.tell(Failed(error))
            return False

    def catch_up(self, engine: Engine | CandidateEngine) -> bool:
        """Run tokens that a grammar has forced at once, in place of one after another.

        Args:
            engine: of the same bundle, which holds nothing that is needed.

        Returns:
            Whether the engine now holds a text of these answers.
        """
        used = False
        for place, row in enumerate(self._rows):
            *forced, last = row.pending
            if len(forced) < _FEWEST_AT_ONCE or row.job.cancelled:
                continue
            tokens = [*row.job.ids, *row.job.completion.ids][: -len(row.pending)]
            engine.restore(Snapshot(tokens, self._decoder.filled(place), PromptRun()))
            engine.add(forced)
            self._decoder.put(place, engine.snapshot())
            row.pending = [last]
            used = True
        return used

    def fail(self, error: Exception) -> None:
        """End all answers."""
        rows, self._rows = self._rows, []
        for row in rows:
            row.job.tell(Failed(error))

    def _leave(self, place: int) -> None:
        """Remove a row; the last one takes its place."""
        last = len(self._rows) - 1
        if place != last:
            self._decoder.move(last, place)
            self._rows[place] = self._rows[last]
        del self._rows[last]
