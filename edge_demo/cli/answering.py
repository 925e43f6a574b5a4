"""Code shared by `generate` and `chat`: makes a generator from arguments, and reports on an
answer."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from edge_demo.bundle.reader import Bundle
from edge_demo.cli.prompt_cache_option import PromptCacheOption
from edge_demo.cli.terminal import note
from edge_demo.device.memory_limits import peak_rss_bytes
from edge_demo.engine.runner import Engine
from edge_demo.errors import BundleError
from edge_demo.text.generator import Generator, engine_for
from edge_demo.text.sampling import Sampler
from edge_demo.text.speculate import Drafter, DraftModel, PromptLookup, check_draft
from edge_demo.text.stop_texts import check_stop_texts
from edge_demo.text.tokenizer import Tokenizer
from edge_demo.units import megabytes

if TYPE_CHECKING:
    from edge_demo.text.answer import Completion


def sampler_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of a `Sampler`."""
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampler)}


def stop_texts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the stop texts of `--stop`; errors as `check_stop_texts`."""
    texts = check_stop_texts(arguments.stop)
    if any("\\n" in text for text in texts):
        note("--stop contains a backslash and the letter n; in bash write a line break as $'\\n'")
    return texts


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """Opens the bundle's tokenizer. If a file has changed, the error says so.

    Raises:
        BundleError: as `Tokenizer`, or a file has changed.
    """
    try:
        return Tokenizer(bundle)
    except BundleError:
        bundle.verify()
        raise


class Answering:
    """The options of a command, checked before anything is loaded.

    Args:
        arguments: of `generate` or `chat`.

    Raises:
        RequestError: an option is out of range.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.sampler = Sampler(**sampler_settings(arguments))
        self.stop = stop_texts(arguments)
        self.cache = PromptCacheOption(arguments.prompt_cache, arguments.prompt_cache_ro)
        self.load_s = 0.0

    def load(self, all_logits: bool = False) -> tuple[Bundle, Generator, Drafter | None]:
        """Open the bundle, and the draft's; errors as `Engine`, `Tokenizer` and `check_draft`.

        Args:
            all_logits: whether those of all tokens are needed, whatever the sampler.
        """
        start = time.perf_counter()
        threads, force = self._arguments.threads, self._arguments.force
        bundle = Bundle.open(self._arguments.bundle)
        tokenizer = open_tokenizer(bundle)
        if all_logits:
            engine = Engine(bundle, threads, force=force)
        else:
            engine = engine_for(bundle, self.sampler, threads, tokenizer, force)
        generator = Generator(engine, tokenizer)
        self.load_s = time.perf_counter() - start
        drafter: Drafter | None = PromptLookup() if self._arguments.lookup else None
        if self._arguments.draft is not None:
            draft = Bundle.open(self._arguments.draft)
            check_draft(bundle, draft)
            engine = engine_for(draft, Sampler(), threads, tokenizer, force)
            drafter = DraftModel(engine, tokenizer.num_pieces)
        return bundle, generator, drafter

    def report(self, completion: Completion) -> dict[str, Any]:
        """An answer for programs."""
        return {
            "prompt_ids": completion.prompt_ids,
            "ids": completion.ids,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "reused_tokens": completion.reused_tokens,
            "prompt_cache": self.cache.report,
            "timings": {
                "load_s": self.load_s,
                "ttft_s": completion.prefill_s,
                "prefill_tokens_per_s": completion.prefill_tokens_per_s,
                "decode_tokens_per_s": completion.decode_tokens_per_s,
            },
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def summary(self, completion: Completion) -> str:
        """How long an answer took, for people."""
        speed = completion.decode_tokens_per_s
        parts = [
            f"load {self.load_s:.1f} s",
            f"first token {completion.prefill_s:.1f} s",
            f"{speed:.0f} tokens/s" if speed else f"{len(completion.ids)} tokens",
            megabytes(peak_rss_bytes()),
        ]
        return " · ".join(parts)
