"""Completes many prompts, several at once.

A completion depends on the file of prompts, the bundle, the machine, its memory
(`edge_demo.engine.memory`) and the number of rows. It does not depend on the prompts that an
interrupted run had already completed. So only the common beginning of all prompts is reused. The
number of rows is always that of the first run; some rows may be idle.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.batch_decoder import SIZES, BatchDecoder, check_rows
from edge_demo.engine.candidates import Candidates
from edge_demo.engine.kv_cache import Snapshot
from edge_demo.engine.runner import CandidateEngine, Engine, common_prefix
from edge_demo.errors import NotFiniteError, RequestError
from edge_demo.text.answer import Completion, Writer
from edge_demo.text.batch_items import Item
from edge_demo.text.generator import candidates_suffice
from edge_demo.text.tokenizer import Tokenizer

# the result of a prompt: a text, or an error
Answer = Completion | RequestError | NotFiniteError


@dataclasses.dataclass
class _Text:
    """A row's text as it grows."""

    item: Item
    completion: Completion
    writer: Writer
    start: float


class BatchRunner:
    """Completes the prompts of a file.

    Args:
        bundle: opened; its files are checked against their hashes here.
        tokenizer: of the same bundle.
        items: all prompts of the file, whether they are to be answered or not.
        rows: how many are decoded at once, one of `SIZES`.
        threads: for one operator; `None` lets onnxruntime take the physical cores.
        force: whether to run what seems not to fit into memory.

    Attributes:
        shared: the tokens that all prompts begin with, which are run once.

    Raises:
        BundleError: as `Engine`.
        EdgeError: there is not enough memory for as many rows.
        RequestError: there cannot be as many rows or threads.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        items: Sequence[Item],
        rows: int = 4,
        threads: int | None = None,
        force: bool = False,
    ) -> None:
        check_rows(rows, "the batch size")
        self._tokenizer = tokenizer
        rows = min(rows, next((size for size in SIZES if size >= len(items)), rows))
        few = all(candidates_suffice(bundle, item.sampler(), tokenizer) for item in items)
        self._engine = (CandidateEngine if few else Engine)(bundle, threads, 1 + rows, force)
        self._rows = BatchDecoder(self._engine, rows)
        self.shared = _beginning_of_all(tokenizer, items, bundle.context_length)
        self._beginning: Snapshot | None = None

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, Answer]]:
        """Answer some of the prompts.

        Args:
            items: in the order in which they begin.

        Yields:
            Each item with its completion or its error, in the order in which they end.
        """
        waiting = iter(items)
        texts: dict[int, _Text] = {}
        free = list(range(len(self._rows.lengths)))
        more = True
        while more or texts:
            while free and more:
                item = next(waiting, None)
                if item is None:
                    more = False
                    break
                try:
                    text, logits = self._begin(item)
                except RequestError as error:
                    yield item, error
                    continue
                if (answer := self._go_on(text, logits)) is None:
                    texts[free[-1]] = text
                    self._rows.put(free.pop(), self._engine.snapshot())
                else:
                    yield item, answer
            if texts:
                outputs = self._rows.decode({r: t.completion.ids[-1] for r, t in texts.items()})
                for row, logits in outputs.items():
                    if (answer := self._go_on(texts[row], logits)) is not None:
                        yield texts.pop(row).item, answer
                        free.append(row)

    def _begin(self, item: Item) -> tuple[_Text, np.ndarray | Candidates]:
        """Run a prompt on the engine alone."""
        start = time.perf_counter()
        ids = item.encode(self._tokenizer)
        self._engine.rewind(0)
        self._engine.check_prompt(ids)
        if self._beginning is None and self.shared:
            self._engine.add(self.shared)
            self._beginning = self._engine.snapshot().copy()
        if self._beginning is not None:
            self._engine.restore(self._beginning)
        completion = Completion(ids, reused_tokens=len(self.shared))
        logits = self._engine.prefill(ids[len(self.shared) :])
        context = self._engine.context_length
        writer = Writer(
            completion, self._tokenizer, item.sampler(), item.max_tokens, context, item.stop
        )
        return _Text(item, completion, writer, start), logits

    def _go_on(self, text: _Text, logits: np.ndarray | Candidates) -> Answer | None:
        """Choose the next token; returns the result of the prompt, or `None` while it continues."""
        out = text.completion
        try:
            text.writer.add(logits)
        except NotFiniteError as error:
            return error
        now = time.perf_counter() - text.start
        out.prefill_s = out.prefill_s or now
        out.decode_s = now - out.prefill_s
        if out.finish_reason == "interrupted":
            return None
        text.writer.finish()
        return out


def _beginning_of_all(tokenizer: Tokenizer, items: Sequence[Item], longest: int) -> list[int]:
    """Returns the common first tokens of all prompts that fit; each prompt has at least one more
    token."""
    shared: list[int] | None = None
    for item in items:
        ids = item.encode(tokenizer)
        if len(ids) <= longest:
            shared = ids if shared is None else shared[: common_prefix(shared, ids)]
            shared = shared[: len(ids) - 1]
            if len(shared) < 2:  # only the beginning-of-sequence token
                return []
    return (shared or []) if len(items) > 1 else []
