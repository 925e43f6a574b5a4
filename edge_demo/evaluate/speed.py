"""Measures a bundle's speed and memory use on this machine."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.device import hardware
from edge_demo.device.memory_limits import peak_rss_bytes
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import RequestError
from edge_demo.text.generator import engine_for
from edge_demo.text.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """A benchmark case: a prompt (`pp`) or tokens generated one by one (`tg`).

    Attributes:
        kind: `pp` or `tg`.
        tokens: timed.
        depth: tokens in the context before the test; they are not timed.
    """

    kind: str
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """Such as `tg128 @ d4096`."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


@dataclasses.dataclass(frozen=True)
class Timing:
    """A test's measurements.

    Attributes:
        test: what was timed.
        threads: for one operator.
        seconds: one for each repeat.
    """

    test: BenchCase
    threads: int
    seconds: tuple[float, ...]

    @property
    def speeds(self) -> list[float]:
        """Tokens a second, one for each repeat."""
        return [self.test.tokens / s for s in self.seconds]

    @property
    def mean(self) -> float:
        """Tokens a second."""
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample, tokens a second; 0 for a single repeat."""
        return statistics.stdev(self.speeds) if len(self.seconds) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """All tests of a bundle.

    Attributes:
        timings: in order.
        load_s: seconds to load the engine the first time.
        peak_rss_bytes: of the whole process.
        celsius: the highest temperature before and after a test; `None` if unknown.
        throttled: the device's throttling state now; `None` if unknown.
    """

    timings: tuple[Timing, ...]
    load_s: float
    peak_rss_bytes: int
    celsius: float | None
    throttled: str | None

    def first(self, kind: str) -> Timing | None:
        """The first test of a kind."""
        return next((t for t in self.timings if t.test.kind == kind), None)


def run_tests(
    bundle: Bundle,
    tests: Sequence[BenchCase],
    threads: Sequence[int | None] = (None,),
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> BenchReport:
    """Load the bundle once for each number of threads and time each test.

    Args:
        bundle: opened.
        tests: to run, in this order.
        threads: for one operator; `None` is the physical cores.
        repeats: of each test.
        progress: called with (runs done, all of them).
        force: as of `Engine`.

    Raises:
        RequestError: there are no tests, or one does not fit the context.
    """
    if not tests:
        raise RequestError(
            "there is no test to run; give a number of prompt tokens (-p) or generated tokens (-n)"
        )
    for test in tests:
        _check_fits(bundle, test.depth, test.tokens)
    runs, done = len(threads) * len(tests) * repeats, 0
    timings, loads, temperatures = [], [], [hardware.celsius()]
    for number in threads:
        runner = _Runner(bundle, number, force)
        loads.append(runner.load_s)
        for test in tests:
            seconds = []
            for _ in range(repeats):
                seconds.append(runner.seconds(test))
                done += 1
                if progress:
                    progress(done, runs)
            temperatures.append(hardware.celsius())
            timings.append(Timing(test, number or hardware.physical_cores() or 1, tuple(seconds)))
        del runner  # before the next is loaded
    known = [t for t in temperatures if t is not None]
    return BenchReport(
        timings=tuple(timings),
        load_s=loads[0],
        peak_rss_bytes=peak_rss_bytes(),
        celsius=max(known, default=None),
        throttled=hardware.throttled(),
    )


def _check_fits(bundle: Bundle, before: int, tokens: int) -> None:
    if before + tokens > bundle.context_length:
        raise RequestError(
            (f"{before:,} + " if before else "")
            + f"{tokens:,} tokens do not fit the context of {bundle.context_length:,}"
        )


class _Runner:
    """Returns an engine after a warm-up run, which loads its weights into memory, and random
    tokens."""

    def __init__(self, bundle: Bundle, threads: int | None, force: bool) -> None:
        start = time.perf_counter()
        self._sampler = Sampler()
        engine = engine_for(bundle, self._sampler, threads, force=force)
        self._engine: Engine | CandidateEngine = engine
        self.load_s = time.perf_counter() - start
        random = np.random.default_rng(0)
        self._text: list[int] = random.integers(
            0, bundle.vocabulary_size, bundle.context_length
        ).tolist()
        self._engine.prefill(self._text[:16])

    def _hold(self, tokens: int) -> None:
        """Bring the context to that many tokens, and drop tokens generated after them."""
        self._engine.rewind(min(tokens, len(self._engine.tokens)))
        if len(self._engine.tokens) < tokens:
            self._engine.prefill(self._text[len(self._engine.tokens) : tokens])

    def seconds(self, test: BenchCase) -> float:
        """Run a test once."""
        run = self._prefill_s if test.kind == "pp" else self._decode_s
        return run(test.depth, test.tokens)

    def _prefill_s(self, depth: int, tokens: int) -> float:
        self._hold(depth)
        start = time.perf_counter()
        self._sampler.pick(self._engine.prefill(self._text[depth : depth + tokens]))
        return time.perf_counter() - start

    def _decode_s(self, depth: int, tokens: int) -> float:
        self._hold(depth)
        token = self._text[depth]
        start = time.perf_counter()
        for _ in range(tokens):
            token = self._sampler.pick(self._engine.decode(token))
        return time.perf_counter() - start
