"""The generator: token ids in, tokens and their text out, one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from edge_demo.answer import Generation, Writer
from edge_demo.bundle import Bundle
from edge_demo.engine import CandidateEngine, Engine, OnProgress, common_prefix
from edge_demo.errors import RequestError
from edge_demo.sampling import Sampler
from edge_demo.speculate import Drafter, Speculator
from edge_demo.stop_texts import check_stop_texts
from edge_demo.tokenizer import Tokenizer


def engine_for(
    bundle: Bundle,
    sampler: Sampler,
    threads: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Engine | CandidateEngine:
    """The engine that does least for a sampler; errors as `Engine`.

    Args:
        bundle: opened.
        sampler: that will choose.
        threads: as of `Engine`.
        tokenizer: of the same bundle, where ids without a piece are not to be chosen.
    """
    few = candidates_suffice(bundle, sampler, tokenizer)
    return (CandidateEngine if few else Engine)(bundle, threads)


def candidates_suffice(
    bundle: Bundle, sampler: Sampler, tokenizer: Tokenizer | None = None
) -> bool:
    """Whether what a sampler chooses among is always among the bundle's candidates."""
    pieces = bundle.vocabulary_size if tokenizer is None else tokenizer.num_pieces
    without = bundle.vocabulary_size - pieces  # all of which may be likelier
    return 0 < sampler.reach <= bundle.num_candidates - without


class Generator:
    """Continues prompts on one engine.

    Args:
        engine: whose tokens are kept between calls: a prompt that begins as the last one did
            costs only what is new.
        tokenizer: of the same bundle.
    """

    def __init__(self, engine: Engine | CandidateEngine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    def prepare(self, ids: Sequence[int]) -> int:
        """Have the engine hold `ids` and nothing else; how many of them it held already.

        Raises:
            RequestError: they do not fit the context.
        """
        held = self._keep(ids, len(ids))
        if held < len(ids):
            self.engine.prefill(list(ids)[held:])
        return held

    def _keep(self, ids: Sequence[int], most: int) -> int:
        """Rewind to what the engine has in common with `ids`, at most `most` tokens of it."""
        common = min(common_prefix(self.engine.tokens, ids), most)
        held = self.engine.reusable(common)
        self.engine.rewind(held)
        return held

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        generation: Generation | None = None,
        drafter: Drafter | None = None,
        on_prefill: OnProgress | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the answer's text as it comes; pieces may be empty.

        Args:
            prompt_ids: to continue; at least one.
            sampler: chooses each token.
            max_tokens: the most to generate.
            generation: filled in while the text is yielded.
            drafter: guesses tokens ahead; the text is the same up to rounding, and comes faster
                if it guesses well; see `edge_demo.speculate`.
            on_prefill: told, after each chunk of the prompt, the tokens run and those in all.
            stop: texts that end the answer and are not part of it.

        Raises:
            RequestError: the prompt is empty or does not fit the context, or `stop` is as
                `check_stop_texts` refuses it.
            NotFiniteError: the model's logits are NaN or infinite.
        """
        if max_tokens < 1:
            raise RequestError(
                f"the number of tokens to generate must be positive, not {max_tokens}"
            )
        stop = check_stop_texts(stop)
        out = generation or Generation(list(prompt_ids))
        start = time.perf_counter()
        # the last token has to give its logits
        reused = self._keep(prompt_ids, max(0, len(prompt_ids) - 1))
        out.reused_tokens = reused
        logits = self.engine.prefill(list(prompt_ids)[reused:], on_prefill)
        since = start
        context = self.engine.context_length
        writer = Writer(out, self.tokenizer, sampler, max_tokens, context, stop)
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
                yield piece
                since = time.perf_counter()  # what a reader does with a piece is its own time
                if out.finish_reason != "interrupted":
                    break
                logits = ahead.decode(out.ids[-1])
        finally:
            ahead.settle()
        yield writer.finish()

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        drafter: Drafter | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """The whole answer at once; arguments and errors as `stream`."""
        generation = Generation(list(prompt_ids))
        for _ in self.stream(prompt_ids, sampler, max_tokens, generation, drafter, stop=stop):
            pass
        return generation
