"""Writes the small random bundles of these tests: `python -m tests.edge_demo.make_bundles FOLDER`.

A process of its own, so that the tests' stays free of what an export needs; what others take from
this module can be had without it, too.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from tests.models import (
    CHATML_JINJA,
    GEMMA_JINJA,
    GENERATIONS,
    chat_tokenizer_model,
    write_tiny_hf,
)

SHORT_CONTEXT = 16
CHATML = ("<|im_start|>", "<|im_end|>")
# Sums over keys are cut as in real models: see `edge_demo.engine.prompt_chunks`.
LONG_CONTEXT = 2048  # tokens; tools in a prompt take some 600 of the small tokenizer
WIDE = {"head_dim": 128, "sliding_window": 64, "max_position_embeddings": 640}
WIDE_RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"recipe": "int8"},
    "rows": {"recipe": "int8-rows", "target": "armv8.0"},
    "board-int8": {"recipe": "int8", "target": "armv8.2"},
    "int4": {"recipe": "int4", "plan": {}},
    "int8-cache": {"recipe": "int8", "kv_cache_dtype": "int8"},
}


def main(folder: Path) -> None:
    """Write the bundles.

    For each generation these are `GENERATION-RECIPE`, `GENERATION-int8-cache` (fp32) and
    `GENERATION-board` (fp32); then `short` (fp32), `chat` (int8), `chatml` and `long-chat` (fp32),
    `wide-RECIPE`, `embedder-RECIPE` (fp32 and int8).
    """
    from export import export_onnx
    from tests.gemma_keras.embedder_files import write_tiny_embedder

    folder.mkdir(parents=True)
    for generation in GENERATIONS:
        source = folder / f"tiny-{generation}"
        write_tiny_hf(source, generation)
        for recipe in ("fp32", "int8"):
            export_onnx(source, folder / f"{generation}-{recipe}", recipe, verify=False)
        out = folder / f"{generation}-int8-cache"
        export_onnx(source, out, "fp32", kv_cache_dtype="int8", verify=False)
        out = folder / f"{generation}-board"
        export_onnx(source, out, "fp32", target="armv8.2", verify=False)
    export_onnx(source, folder / "short", "fp32", max_context=SHORT_CONTEXT, verify=False)
    write_tiny_hf(folder / "tiny-long", "gemma3", max_position_embeddings=LONG_CONTEXT)
    turns = {
        "chat": (source, (), GEMMA_JINJA, "int8"),
        "chatml": (source, CHATML, CHATML_JINJA, "fp32"),
        "long-chat": (folder / "tiny-long", (), GEMMA_JINJA, "fp32"),
    }
    for name, (base, tokens, template, recipe) in turns.items():
        tuned = folder / f"tiny-{name}"
        shutil.copytree(base, tuned)
        # As user-defined pieces: what is exported makes control pieces of them.
        (tuned / "tokenizer.model").write_bytes(chat_tokenizer_model(*tokens, turn_type=4))
        (tuned / "chat_template.jinja").write_text(template)
        export_onnx(tuned, folder / name, recipe, verify=False)
    write_tiny_hf(folder / "tiny-wide", "gemma3", **WIDE)
    for name, options in WIDE_RECIPES.items():
        out = folder / f"wide-{name}"
        export_onnx(folder / "tiny-wide", out, calibration="none", verify=False, **options)
    write_tiny_embedder(folder / "tiny-embedder")
    for recipe in ("fp32", "int8"):
        out = folder / f"embedder-{recipe}"
        export_onnx(folder / "tiny-embedder", out, recipe, calibration="none", verify=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
