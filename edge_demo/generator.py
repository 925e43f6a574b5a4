"""The generator: token ids in, tokens and their text out, one at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from edge_demo.bundle import Bundle
from edge_demo.engine import CandidateEngine, Engine, OnProgress, common_prefix
from edge_demo.errors import RequestError
from edge_demo.sampling import Sampler
from edge_demo.speculate import Drafter, Speculator
from edge_demo.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclasses.dataclass
class Generation:
    """One answer, filled in as it grows.

    Attributes:
        prompt_ids: what it continues.
        ids: the tokens generated so far, the stop token not among them.
        text: their text.
        finish_reason: a stop token came, `max_tokens` was reached, or the context was full;
            `interrupted` until then.
        reused_tokens: tokens of the prompt that an earlier answer had left in the engine.
        prefill_s: from the start to the first token.
        decode_s: from the first token to the last, without the time that the reader of the text
            takes.
    """

    prompt_ids: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "interrupted"
    reused_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def take(self, token: int, text: TextStream, max_tokens: int, context: int) -> str:
        """Add the next token, unless it ends the answer.

        Args:
            token: as it was chosen.
            text: turns tokens into text.
            max_tokens: the most there may be.
            context: how many tokens an engine can hold, which need not hold the last one.

        Returns:
            The text that has become certain, which may be empty. `finish_reason` is `interrupted`
            as long as there is more to come.
        """
        piece = ""
        if token in text.tokenizer.spec.stop:
            self.finish_reason = "stop"
        else:
            self.ids.append(token)
            piece = text.push(token)
            if len(self.ids) >= max_tokens:
                self.finish_reason = "length"
            elif len(self.prompt_ids) + len(self.ids) > context:
                self.finish_reason = "context"
        self.text += piece
        return piece

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens computed a second."""
        computed = len(self.prompt_ids) - self.reused_tokens
        return computed / self.prefill_s if self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second after the first; `None` while there is no second."""
        return (len(self.ids) - 1) / self.decode_s if self.decode_s and len(self.ids) > 1 else None


def engine_for(
    bundle: Bundle, sampler: Sampler, threads: int | None = None
) -> Engine | CandidateEngine:
    """The engine that does least for a sampler; errors as `Engine`."""
    if 0 < sampler.reach <= bundle.num_candidates:
        return CandidateEngine(bundle, threads)
    return Engine(bundle, threads)


class Generator:
    """Continues prompts on one engine.

    An answer is to the bit what a fresh engine would give: of what earlier prompts left, only that
    is used again which would come out the same (`edge_demo.courses`).

    Args:
        engine: whose tokens are kept between calls.
        tokenizer: of the same bundle.
    """

    def __init__(self, engine: Engine | CandidateEngine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._turn = (0, 0)  # tokens of a conversation's last prompt, and those with its answer

    def prepare(self, ids: Sequence[int]) -> int:
        """Hold the beginning of a conversation and nothing else; how much of it was held already.

        Raises:
            RequestError: it does not fit the context.
        """
        self._turn = (0, 0)
        held = self.engine.hold(ids)
        self._turn = (len(ids), len(ids))
        return held

    def _run_before_last(
        self, prompt_ids: Sequence[int], goes_on: bool, on_prefill: OnProgress | None
    ) -> int:
        """Hold all of a prompt but its last token; how many were there already."""

        def told(done: int, total: int) -> None:
            if on_prefill is not None:
                on_prefill(done, total + 1)

        before = prompt_ids[:-1]
        (last_prompt, said), self._turn = self._turn, (0, 0)
        same = min(said, common_prefix(self.engine.tokens, before))
        if goes_on and 0 < last_prompt <= same and self.engine.reusable(same):
            self.engine.rewind(same)
            self.engine.add(before[same:], told)
            return same
        return self.engine.hold(before, told)

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        generation: Generation | None = None,
        drafter: Drafter | None = None,
        on_prefill: OnProgress | None = None,
        on_held: Callable[[Generation], None] | None = None,
        goes_on: bool = False,
    ) -> Iterator[str]:
        """Yield the answer's text as it comes; pieces may be empty.

        Args:
            prompt_ids: to continue; at least one.
            sampler: chooses each token.
            max_tokens: the most to generate.
            generation: filled in while the text is yielded.
            drafter: guesses tokens ahead; the text is the same up to rounding, and comes faster
                if it guesses well; see `edge_demo.speculate`.
            on_prefill: told, after each piece of the prompt, the tokens run and those in all.
            on_held: called when the engine holds the prompt but its last token.
            goes_on: whether this is the next turn of a conversation. If it begins with the last
                prompt, or with what `prepare` was given, what that and its answer left is used as
                it is: only what is new is run, and the text depends on how the turns were cut.
                After an answer that was given up it is a prompt as any other.

        Raises:
            RequestError: the prompt is empty or does not fit the context.
        """
        if max_tokens < 1:
            raise RequestError(
                f"the number of tokens to generate must be positive, not {max_tokens}"
            )
        self.engine.check(prompt_ids)
        out = generation or Generation(list(prompt_ids))
        start = time.perf_counter()
        out.reused_tokens = self._run_before_last(list(prompt_ids), goes_on, on_prefill)
        if on_held is not None:
            on_held(out)
        logits = self.engine.decode(prompt_ids[-1])
        if on_prefill is not None:
            computed = len(prompt_ids) - out.reused_tokens
            on_prefill(computed, computed)
        since = start
        text = TextStream(self.tokenizer)
        ahead = Speculator(self.engine, drafter, prompt_ids)
        try:
            while True:
                token = sampler.pick(logits)
                now = time.perf_counter()
                if not out.prefill_s:
                    out.prefill_s = now - start
                piece = out.take(token, text, max_tokens, self.engine.context_length)
                if out.finish_reason == "stop":
                    break
                if len(out.ids) > 1:
                    out.decode_s += now - since
                yield piece
                since = time.perf_counter()  # what a reader does with a piece is its own time
                if out.finish_reason != "interrupted":
                    break
                logits = ahead.decode(token)
            # the last token may not have been run
            self._turn = len(prompt_ids), len(prompt_ids) + max(0, len(out.ids) - 1)
        finally:
            ahead.settle()
        rest = text.flush()
        out.text += rest
        yield rest

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        drafter: Drafter | None = None,
    ) -> Generation:
        """The whole answer at once; arguments and errors as `stream`."""
        generation = Generation(list(prompt_ids))
        for _ in self.stream(prompt_ids, sampler, max_tokens, generation, drafter):
            pass
        return generation
