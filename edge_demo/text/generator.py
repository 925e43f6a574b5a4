"""The generator: token ids in, tokens and their text out, one at a time."""

from __future__ import annotations

import dataclasses
import time
from collections import abc
from collections.abc import Callable, Iterator, Sequence

from edge_demo.bundle.reader import Bundle
from edge_demo.engine import memory
from edge_demo.engine.runner import CandidateEngine, Engine, OnProgress, common_prefix
from edge_demo.errors import RequestError, TooLittleMemoryError
from edge_demo.text.answer import Completion, TextPiece, Writer
from edge_demo.text.grammar import Grammar
from edge_demo.text.sampling import Sampler
from edge_demo.text.speculate import Drafter, Speculator
from edge_demo.text.stop_texts import check_stop_texts
from edge_demo.text.tokenizer import Tokenizer

# Tokens of a conversation's last prompt, and those with its answer; of none, 0 and 0.
Place = tuple[int, int]
_FEW = 40  # tokens to sample from, as an example


def engine_for(
    bundle: Bundle,
    sampler: Sampler,
    threads: int | None = None,
    tokenizer: Tokenizer | None = None,
    force: bool = False,
) -> Engine | CandidateEngine:
    """The engine that does least for a sampler; errors as `Engine`.

    Args:
        bundle: opened.
        sampler: that will choose.
        threads: as of `Engine`.
        tokenizer: of the same bundle, where ids without a piece are not to be chosen.
        force: as of `Engine`.
    """
    if candidates_suffice(bundle, sampler, tokenizer):
        return CandidateEngine(bundle, threads, force=force)
    try:
        return Engine(bundle, threads, force=force)
    except TooLittleMemoryError as error:
        fewer = dataclasses.replace(sampler, top_k=_FEW)
        suffice = candidates_suffice(bundle, fewer, tokenizer)
        if not suffice or memory.fitting(bundle, bundle.candidates)[1] is not None:
            raise
        raise TooLittleMemoryError(f"{error}; sampling with --top-k {_FEW} would fit") from None


def candidates_suffice(
    bundle: Bundle, sampler: Sampler, tokenizer: Tokenizer | None = None, lowered: int = 0
) -> bool:
    """Whether what a sampler chooses among is always among the bundle's candidates.

    Args:
        bundle: opened.
        sampler: that will choose.
        tokenizer: of the same bundle, where ids without a piece are not to be chosen.
        lowered: how many tokens have their logits lowered before it chooses.
    """
    pieces = bundle.vocabulary_size if tokenizer is None else tokenizer.num_pieces
    without = bundle.vocabulary_size - pieces  # all of which may be likelier
    reach = sampler.effective_top_k
    return 0 < reach <= bundle.num_candidates - without - lowered


class CompletionStream(Iterator[TextPiece]):
    """An answer that comes piece by piece.

    Attributes:
        completion: what has come so far, with why it ended and how long it took.
    """

    def __init__(
        self, completion: Completion, pieces: abc.Generator[TextPiece, None, None]
    ) -> None:
        self.completion = completion
        self._pieces = pieces

    def __next__(self) -> TextPiece:
        return next(self._pieces)

    def close(self) -> None:
        """Give the answer up; the engine can be used again."""
        self._pieces.close()


class Generator:
    """Continues prompts on one engine.

    An answer is to the bit what a fresh engine would give: of what earlier prompts left, only that
    is used again which would come out the same (`edge_demo.engine.prompt_chunks`).

    Args:
        engine: whose tokens are kept between calls.
        tokenizer: of the same bundle.

    Attributes:
        place: what the next turn of a conversation goes on from; it may be set to one of before,
            of the same conversation.
    """

    def __init__(self, engine: Engine | CandidateEngine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.place: Place = (0, 0)

    def prepare(self, ids: Sequence[int]) -> int:
        """Hold the beginning of a conversation and nothing else; how much of it was held already.

        Raises:
            RequestError: it does not fit the context.
        """
        self.place = (0, 0)
        held = self.engine.hold(ids)
        self.place = (len(ids), len(ids))
        return held

    def _run_before_last(
        self, prompt_ids: Sequence[int], goes_on: bool, on_prefill: OnProgress | None
    ) -> int:
        """Hold all of a prompt but its last token; how many were there already."""

        def report(done: int, total: int) -> None:
            if on_prefill is not None:
                on_prefill(done, total + 1)

        before = prompt_ids[:-1]
        (last_prompt, said), self.place = self.place, (0, 0)
        same = min(said, common_prefix(self.engine.tokens, before))
        if goes_on and 0 < last_prompt <= same and self.engine.reusable(same):
            self.engine.rewind(same)
            self.engine.add(before[same:], report)
            return same
        return self.engine.hold(before, report)

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        drafter: Drafter | None = None,
        on_prefill: OnProgress | None = None,
        stop: Sequence[str] = (),
        on_held: Callable[[Completion], None] | None = None,
        goes_on: bool = False,
        grammar: Grammar | None = None,
    ) -> CompletionStream:
        """Begin an answer; its text comes as the stream is iterated.

        Args:
            prompt_ids: to continue; at least one.
            sampler: chooses each token.
            max_tokens: the most to generate.
            drafter: guesses tokens ahead; the text is the same up to rounding, and comes faster
                if it guesses well; see `edge_demo.text.speculate`.
            on_prefill: called after each chunk of the prompt with (tokens run, all of them).
            stop: texts that end the answer and are not part of it.
            on_held: called when the engine holds the prompt but its last token.
            goes_on: whether this is the next turn of a conversation. If it begins with the last
                prompt, or with what `prepare` was given, what that and its answer left is used as
                it is: only what is new is run, and the text depends on how the turns were cut.
                After an answer that was given up it is a prompt as any other.
            grammar: at its beginning, which the answer keeps to. It needs an `Engine`, which has
                the logits of all tokens, and no drafter.

        Raises:
            RequestError: the prompt is empty or does not fit the context, `stop` is as
                `check_stop_texts` refuses it, or a grammar comes with a drafter.
            NotFiniteError: the model's logits are NaN or infinite, while the stream is iterated.
        """
        if max_tokens < 1:
            raise RequestError(
                f"the number of tokens to generate must be positive, not {max_tokens}"
            )
        stop = check_stop_texts(stop)
        self.engine.check(prompt_ids)
        completion = Completion(list(prompt_ids))
        context = self.engine.context_length
        if grammar is not None and drafter is not None:
            raise RequestError("an answer in a promised form cannot be drafted; give one of both")
        writer = Writer(
            completion, self.tokenizer, sampler, max_tokens, context, stop, grammar=grammar
        )
        pieces = self._pieces(completion, writer, drafter, on_prefill, on_held, goes_on)
        return CompletionStream(completion, pieces)

    def _pieces(
        self,
        out: Completion,
        writer: Writer,
        drafter: Drafter | None,
        on_prefill: OnProgress | None,
        on_held: Callable[[Completion], None] | None,
        goes_on: bool,
    ) -> abc.Generator[TextPiece, None, None]:
        prompt_ids = out.prompt_ids
        start = time.perf_counter()
        out.reused_tokens = self._run_before_last(prompt_ids, goes_on, on_prefill)
        if on_held is not None:
            on_held(out)
        logits = self.engine.decode(prompt_ids[-1])
        if on_prefill is not None:
            computed = len(prompt_ids) - out.reused_tokens
            on_prefill(computed, computed)
        since = start
        ahead = Speculator(self.engine, drafter, prompt_ids)
        try:
            while True:
                piece = writer.add(logits)
                now = time.perf_counter()
                if not out.prefill_s:
                    out.prefill_s = now - start
                if piece is None:
                    break
                if len(out.ids) > 1:
                    out.decode_s += now - since
                chosen = len(out.ids) - 1
                piece += writer.add_forced()
                yield TextPiece(piece, out.ids[-1])
                since = time.perf_counter()  # what a reader does with a piece is its own time
                if out.finish_reason != "interrupted":
                    break
                if len(out.ids) - 1 > chosen:
                    self.engine.add(out.ids[chosen:-1])
                logits = ahead.decode(out.ids[-1])
            # the last token may not have been run
            self.place = len(prompt_ids), len(prompt_ids) + max(0, len(out.ids) - 1)
        finally:
            ahead.settle()
        yield TextPiece(writer.finish(), None)

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        drafter: Drafter | None = None,
        stop: Sequence[str] = (),
    ) -> Completion:
        """The whole answer at once; arguments and errors as `stream`."""
        stream = self.stream(prompt_ids, sampler, max_tokens, drafter, stop=stop)
        for _ in stream:
            pass
        return stream.completion
