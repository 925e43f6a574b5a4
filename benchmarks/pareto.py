"""How faithful and how fast: bundles beside other engines on the same weights, one table, one plot.

    pip install -e .[benchmarks]
    python benchmarks/pareto.py build/sample-int4 build/sample-int8 --reference build/sample-fp32 \\
        --text WIKITEXT --out build/pareto

The peers are made in the output folder: llama.cpp's Q4_K_M (the sample itself), Q4_0 and Q8_0,
quantized again from that file, and onnxruntime-genai's own int4 export of the same weights. Mean KL
divergence from the float32 bundle is over the second halves of windows of 512 tokens. Speeds are
medians over rounds in which the contenders take turns, each in a process of its own, at the same
number of threads. Writes `pareto.json` and `pareto.svg`; prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from peers import Contender, genai_export, requantized

from edge_demo.bundle.reader import Bundle
from edge_demo.cli.terminal import Progress
from edge_demo.engine.runner import Engine
from edge_demo.evaluate.compare import compare
from edge_demo.text.tokenizer import Tokenizer
from gemma_keras.checkpoints.opening.sample import sample_path

_WINDOW = 512
_LEAST_KL = 3e-4  # drawn; floats lie far below
_COLORS = {"bundle": "#1a73e8", "llama.cpp": "#e37400", "onnxruntime-genai": "#188038"}


def peers_of_the_sample(out: Path, reference: Path) -> list[Contender]:
    """llama.cpp and onnxruntime-genai on the sample's weights, made where they are missing."""
    out.mkdir(parents=True, exist_ok=True)
    source = sample_path()
    llama = [Contender("llama.cpp Q4_K_M", "llama.cpp", source)]
    for name in ("Q4_0", "Q8_0"):
        path = requantized(source, name, out / f"{name}.gguf")
        llama.append(Contender(f"llama.cpp {name}", "llama.cpp", path))
    whole, pruned = (
        genai_export("sample", reference, out / name, pruned)
        for name, pruned in (("genai-int4", False), ("genai-int4-pruned", True))
    )
    return [*llama, Contender("onnxruntime-genai int4", "onnxruntime-genai", pruned, whole)]


def measure_quality(
    contenders: Sequence[Contender], reference: Path, text: str, windows: int, threads: int
) -> list[dict[str, float]]:
    """Mean KL divergence and the like, of each, over the same windows."""
    engine = Engine(Bundle.open(reference), threads)
    tokenizer = Tokenizer(engine.bundle)
    found = compare(
        engine,
        [contender.logits(threads) for contender in contenders],
        tokenizer.spec.bos,
        tokenizer.encode(text, bos=False),
        _WINDOW,
        windows,
        Progress("window"),
    )
    halves = [comparison.second_halves for comparison in found]
    return [
        {
            "kl": half.kl.value,
            "kl_error": half.kl.error,
            "same_top_token": half.same_top_token.value,
            "perplexity": half.perplexity.value,
            "reference_perplexity": half.reference_perplexity.value,
        }
        for half in halves
    ]


def measure_speed(
    contenders: Sequence[Contender],
    threads: int,
    rounds: int,
    prompt: int = 512,
    new: int = 64,
    repeats: int = 3,
) -> list[dict[str, float]]:
    """Medians over rounds in which the contenders take turns."""
    told, runs = Progress("round"), {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders:
            runs[contender.name].append(contender.speed(threads, prompt, new, repeats))
        told(number + 1, rounds)
    return [
        {key: statistics.median(run[key] for run in found) for key in found[0]}
        for found in runs.values()
    ]


def table(rows: Sequence[Mapping], baseline: str) -> str:
    """The figures as Markdown; decode speed also as a ratio to one of the rows."""
    base = next((row["decode"] for row in rows if row["name"] == baseline), None)
    lines = [
        "| | mean KL | same top token | perplexity | MB read per token | decode, tokens/s "
        "| ratio | prefill, tokens/s | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['decode'] / base:.2f}" if base else ""
        lines.append(
            f"| {row['name']} | {row['kl']:.4f} | {row['same_top_token']:.1%} "
            f"| {row['perplexity']:.2f} | {row['bytes_per_token'] / 1e6:.0f} "
            f"| {row['decode']:.1f} | {ratio} | {row['prefill']:.0f} "
            f"| {row['peak'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """KL over decode speed; a point's area is the bytes that a token reads."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pareto"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6))
    height = {row["name"]: max(row["kl"], _LEAST_KL) for row in rows}
    for row in rows:
        size = row["bytes_per_token"] / 1e6
        kl = height[row["name"]]
        # named on the left where another point stands on the right
        right = not any(
            other["decode"] > row["decode"] and 0.7 < height[other["name"]] / kl < 1.4
            for other in rows
        )
        label = f"{row['name']}, {size:.0f} MB" + (" (KL below)" if kl > row["kl"] else "")
        axes.scatter(row["decode"], kl, s=size, color=_COLORS[row["kind"]], alpha=0.6)
        axes.annotate(
            label,
            (row["decode"], kl),
            xytext=(14 if right else -14, 0),
            textcoords="offset points",
            fontsize=9,
            ha="left" if right else "right",
            va="center",
        )
    axes.set_yscale("log")
    axes.set_xlabel("decode, tokens/s (right is better)")
    axes.set_ylabel("mean KL from float32, nats (down is better)")
    axes.set_title("Gemma 3 270M: faithful and fast; area: bytes read per token")
    axes.margins(x=0.3, y=0.1)
    axes.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, required=True, help="the float32 bundle")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--baseline", help="the row that ratios are to")
    arguments = parser.parse_args()

    contenders = [Contender(path.name, "bundle", path) for path in arguments.bundles]
    contenders += peers_of_the_sample(arguments.out, arguments.reference)
    text = arguments.text.read_text(encoding="utf-8")
    qualities = measure_quality(
        contenders, arguments.reference, text, arguments.windows, arguments.threads
    )
    speeds = measure_speed(contenders, arguments.threads, arguments.rounds)
    rows = [
        {"name": c.name, "kind": c.kind, "bytes_per_token": c.bytes_per_token()} | quality | speed
        for c, quality, speed in zip(contenders, qualities, speeds, strict=True)
    ]
    (arguments.out / "pareto.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, arguments.out / "pareto.svg")
    print(table(rows, arguments.baseline or contenders[0].name))


if __name__ == "__main__":
    main()
