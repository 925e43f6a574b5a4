"""The engine beside other engines on the same weights: prefill, decode, peak memory, as ratios.

    pip install -e .[benchmarks]
    python benchmarks/edge.py build/sample-int4 build/sample-int8 --reference build/sample-fp32 \\
        --out build/pareto

All take turns, each in a process of its own, at the same number of threads, with huge pages for
whoever allocates with malloc. Prints medians of 512 tokens of prefill and 64 of decode after them,
and each bundle's ratio to each peer. How faithful each is: `pareto.py`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pareto import measure_speed, peers_of_the_sample
from peers import Contender


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, required=True, help="the float32 bundle")
    parser.add_argument("--out", type=Path, required=True, help="where the peers are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    contenders = [Contender(path.name, "bundle", path) for path in arguments.bundles]
    contenders += peers_of_the_sample(arguments.out, arguments.reference)
    print(table(contenders, measure_speed(contenders, arguments.threads, arguments.rounds)))


if __name__ == "__main__":
    main()
