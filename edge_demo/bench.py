"""How fast a bundle is on this machine, and how much memory it takes."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time

import numpy as np

from edge_demo.bundle import Bundle
from edge_demo.errors import RequestError
from edge_demo.generator import engine_for
from edge_demo.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """One measurement; speeds are medians over the repeats.

    Attributes:
        load_s: from nothing to a ready engine.
        ttft_s: from the prompt to the first token.
        prefill_tokens_per_s: over the prompt.
        decode_tokens_per_s: over the tokens generated after it.
        peak_rss_bytes: of the whole process.
        prompt_tokens: length of the prompt.
        decode_tokens: tokens generated.
        repeats: measurements taken.
    """

    load_s: float
    ttft_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: int
    prompt_tokens: int
    decode_tokens: int
    repeats: int


def bench(
    bundle: Bundle,
    threads: int | None = None,
    prompt_tokens: int = 512,
    decode_tokens: int = 64,
    repeats: int = 3,
) -> BenchResult:
    """Load the bundle and time a random prompt and greedy decoding after it.

    Raises:
        RequestError: the counts are not positive, or do not fit the context.
    """
    if min(prompt_tokens, decode_tokens, repeats) < 1:
        raise RequestError("prompt tokens, decode tokens and repeats must be positive")
    if prompt_tokens + decode_tokens > bundle.context_length:
        raise RequestError(
            f"{prompt_tokens} + {decode_tokens} tokens do not fit the context of "
            f"{bundle.context_length}"
        )
    start = time.perf_counter()
    sampler = Sampler()
    engine = engine_for(bundle, sampler, threads)
    load_s = time.perf_counter() - start

    prompt = np.random.default_rng(0).integers(0, bundle.vocabulary_size, prompt_tokens).tolist()
    engine.prefill(prompt[:16])  # a first run pages the weights in
    prefills, decodes = [], []
    for _ in range(repeats):
        engine.rewind(0)
        start = time.perf_counter()
        token = sampler.pick(engine.prefill(prompt))
        first = time.perf_counter()
        for _ in range(decode_tokens):
            token = sampler.pick(engine.decode(token))
        prefills.append(first - start)
        decodes.append(time.perf_counter() - first)
    ttft_s = statistics.median(prefills)
    return BenchResult(
        load_s=load_s,
        ttft_s=ttft_s,
        prefill_tokens_per_s=prompt_tokens / ttft_s,
        decode_tokens_per_s=decode_tokens / statistics.median(decodes),
        peak_rss_bytes=peak_rss_bytes(),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        repeats=repeats,
    )


def peak_rss_bytes() -> int:
    """The most memory this process has had resident, in bytes."""
    try:
        # Not `ru_maxrss`: that begins with what the parent had when it started this process.
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
