"""Runs a bundle between marks that the plugin sees: `device.py BUNDLE NAMES` on the emulated board.

It runs prompts, single tokens and tokens far into a context, greedy choice included, on one thread.
NAMES gets the name of each mark, and the peak memory. See `tools.count_arm64.plan` for the names.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import peak_rss_bytes
from edge_demo.text.generator import engine_for
from edge_demo.text.sampling import Sampler
from tools.count_arm64.plan import Plan

_FIRST_MARK = -4242000  # as plugin.c has it


class Marks:
    """Sets marks and keeps their names.

    Attributes:
        names: of the instructions that end at each mark; empty where they are not of interest.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self.names: list[str] = []

    def __call__(self, name: str = "") -> None:
        """End the instructions of that name."""
        self._libc.getpgid(_FIRST_MARK - len(self.names))
        self.names.append(name)


def run(bundle: Bundle, plan: Plan, mark: Marks) -> None:
    """Run what a plan says between marks."""
    sampler = Sampler()
    engine = engine_for(bundle, sampler, threads=1)
    length = max(*plan.prompts, plan.depth) + 1
    ids = np.random.default_rng(0).integers(3, bundle.vocabulary_size, length).tolist()
    sampler.pick(engine.prefill(ids[:8]))  # what a first run allocates
    for count in plan.prompts:
        engine.rewind(0)
        mark()
        sampler.pick(engine.prefill(ids[:count]))
        mark(plan.prompt_name(count))
    for depth in (plan.shallow, plan.depth):
        engine.rewind(0)
        token = sampler.pick(engine.prefill(ids[:depth]))
        token = sampler.pick(engine.decode(token))  # what a first token allocates
        for _ in range(plan.tokens):
            mark()
            token = sampler.pick(engine.decode(token))
            mark(plan.token_name(depth))


def main() -> None:
    """Run the bundle; write the names of the marks."""
    path, names = map(Path, sys.argv[1:3])
    mark = Marks()
    run(Bundle.open(path), Plan.from_words(sys.argv[3:]), mark)
    names.write_text(json.dumps({"names": mark.names, "peak_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
