"""Exports an embedder of EmbeddingGemma's size with random weights, and measures it on this device.

    python -m benchmarks.embedder FOLDER

Size and speed do not depend on the weights, quality does. The tokenizer is Gemma's, from the preset
`sample`. Each measurement runs in a new process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from export import export_onnx
from gemma_keras import GemmaBackbone, GemmaTextEmbedder, GemmaTokenizer, open_checkpoint
from gemma_keras.checkpoints.hf.config import config_from_hf
from gemma_keras.sizes import releases
from gemma_keras.text_embedder import GemmaTextEmbedderPreprocessor

RECIPES = ("fp32", "int8", "int4")
TOKENS = (256, 2048)  # of a text, its beginning and end included
REPEATS = 3


def random_embedder() -> GemmaTextEmbedder:
    """EmbeddingGemma 300M before it has learnt anything."""
    size = next(s for s, r in releases() if r.repository.endswith("/embeddinggemma-300m"))
    backbone = GemmaBackbone(config_from_hf(size.hf), dtype="float32")
    tokenizer = GemmaTokenizer(proto=open_checkpoint("sample").tokenizer_model)
    return GemmaTextEmbedder(
        backbone, GemmaTextEmbedderPreprocessor(tokenizer, sequence_length=TOKENS[-1])
    )


def measure(bundle: Path, tokens: int) -> dict[str, float]:
    """The best of some runs of `edge-demo embed` with one text: seconds, and bytes at most."""
    text = " a" * (tokens - 2)
    command = [sys.executable, "-m", "edge_demo", "embed", str(bundle), text, "--json"]
    runs = []
    for _ in range(REPEATS):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert runs[0]["tokens"] == [tokens], runs[0]["tokens"]
    return {
        "load_s": min(run["timings"]["load_s"] for run in runs),
        "embed_s": min(run["timings"]["embed_s"] for run in runs),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def main() -> None:
    """Print a table and one object a recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the bundles go")
    folder = parser.parse_args().folder
    model = random_embedder()
    print("| recipe | bundle | export | load | 256 tokens | memory | 2,048 tokens | memory |")
    print("|---|---|---|---|---|---|---|---|")
    reports = []
    for recipe in RECIPES:
        start = time.perf_counter()
        made = export_onnx(model, folder / recipe, recipe, overwrite=True)
        export_s = time.perf_counter() - start
        short, long = (measure(made.path, tokens) for tokens in TOKENS)
        print(
            f"| `{recipe}` | {made.num_bytes / 1e6:,.0f} MB | {export_s:.0f} s | "
            f"{short['load_s']:.1f} s | {short['embed_s']:.2f} s | "
            f"{short['peak_rss_bytes'] / 1e6:,.0f} MB | {long['embed_s']:.1f} s | "
            f"{long['peak_rss_bytes'] / 1e6:,.0f} MB |",
            flush=True,
        )
        reports.append({"recipe": recipe, "export_s": export_s, "short": short, "long": long})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_rss_bytes_of_exports": peak, "recipes": reports}))


if __name__ == "__main__":
    main()
