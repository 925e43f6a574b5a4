"""The engine beside other engines on the same weights: prefill, decode, peak memory, as ratios.

    pip install -e .[benchmarks]
    python benchmarks/edge.py build/sample-int4 build/sample-int8 --reference build/sample-fp32 \\
        --out build/pareto

All take turns, each in a process of its own, at the same number of threads, with huge pages for
whoever allocates with malloc. Prints medians of 512 tokens of prefill and 64 of decode after them,
each bundle's ratio to each peer, and the share of the memory's bandwidth that each uses. How
faithful each is: `pareto.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pareto import measure_speed, peers_of_the_sample
from peers import Contender

from edge_demo.device import huge_pages
from edge_demo.device.throughput import memory_bytes_per_s


def table(contenders: Sequence[Contender], speeds: Sequence[Mapping[str, float]]) -> str:
    """The figures as Markdown; of a bundle also how many times as fast as each peer it is."""
    ours = [(c, s) for c, s in zip(contenders, speeds, strict=True) if c.kind == "bundle"]
    heads = ["", "prefill, tokens/s", "decode, tokens/s", "peak memory"]
    heads += [f"{c.name}: prefill, decode, memory" for c, _ in ours]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for contender, speed in zip(contenders, speeds, strict=True):
        cells = [contender.name, f"{speed['prefill']:.0f}", f"{speed['decode']:.1f}"]
        cells.append(f"{speed['peak'] / 1e6:.0f} MB")
        for _, own in ours:
            ratios = (own[key] / speed[key] for key in ("prefill", "decode", "peak"))
            cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares(
    contenders: Sequence[Contender], speeds: Sequence[Mapping[str, float]], threads: int
) -> str:
    """How much of the memory's read bandwidth decoding uses, counted in the weights it reads."""
    bandwidth = statistics.median(memory_bytes_per_s(threads) for _ in range(5))
    lines = [f"{bandwidth / 1e9:.1f} GB/s are read by {threads} threads; of that"]
    for contender, speed in zip(contenders, speeds, strict=True):
        size = contender.bytes_per_token()
        share = size * speed["decode"] / bandwidth
        lines.append(f"* {contender.name}: {share:.0%}, {size / 1e6:,.0f} MB a token")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, required=True, help="the float32 bundle")
    parser.add_argument("--out", type=Path, required=True, help="where the peers are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    os.environ.setdefault(huge_pages.VARIABLE, huge_pages.SETTING)
    contenders = [Contender(path.name, "bundle", path) for path in arguments.bundles]
    contenders += peers_of_the_sample(arguments.out, arguments.reference)
    speeds = measure_speed(contenders, arguments.threads, arguments.rounds)
    print(table(contenders, speeds))
    print(f"\n{shares(contenders, speeds, arguments.threads)}")


if __name__ == "__main__":
    main()
