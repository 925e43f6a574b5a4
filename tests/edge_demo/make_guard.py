"""Tunes and exports a small guard: `python -m tests.edge_demo.make_guard FOLDER`.

`examples/tune_guard.py` teaches it nothing but texts of `examples/guard_prompts.csv`. Every fourth of
them is held out, for tests to judge.
"""

from __future__ import annotations

import csv
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 256,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
_PIECES = 1000
_TUNING = (
    *("--rank=0", "--learning-rate=3e-3", "--batch-size=16", "--recipe=fp32"),
    "--epochs=6",  # more of them learn the texts by heart
)


def lines() -> list[dict[str, str]]:
    """The labelled texts."""
    with (EXAMPLES / "guard_prompts.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def held_out() -> list[dict[str, str]]:
    """Those that the guard has not seen."""
    return lines()[::4]


def main(folder: Path) -> None:
    """Write the bundle."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import transformers

    from tests.models import hf_config

    learnt = [line for number, line in enumerate(lines()) if number % 4]
    script = EXAMPLES / "tune_guard.py"
    rows = runpy.run_path(str(script))["rows_of"](learnt, seed=0)
    config = hf_config("gemma3")
    config.update(_SIZES | {"vocab_size": _PIECES})
    transformers.set_seed(0)
    untaught = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in untaught.named_parameters():
        if weight.ndim == 2:  # transformers' are too small for so narrow a model
            weight.data.normal_(0, 0.1 if "embed" in name else weight.shape[1] ** -0.5)
    with tempfile.TemporaryDirectory() as made:
        source, texts = Path(made) / "tiny-guard", Path(made) / "texts.csv"
        untaught.save_pretrained(source)
        (source / "tokenizer.model").write_bytes(_tokenizer(learnt, rows))
        with texts.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, learnt[0])
            writer.writeheader()
            writer.writerows(learnt)
        sys.argv = [str(script), str(source), str(texts), str(folder), *_TUNING]
        runpy.run_path(str(script), run_name="__main__")


def _tokenizer(texts: list[dict[str, str]], rows: list[dict[str, str]]) -> bytes:
    """A SentencePiece model with Gemma's conventions and its tokens of turns."""
    from edge_demo.guard.template import END, START
    from tests.models import train_tokenizer

    sentences = [line[key] for line in texts for key in ("prompt", "response") if line[key]]
    # some rows for the words of policies, whose repetition must not crowd out the others
    sentences += [part for row in rows[:8] for part in row["prompt"].split("\n") if part]
    return train_tokenizer(
        [*sentences, "Yes", "No"] * 4,
        _PIECES,
        control_symbols=[START, END],
        user_defined_symbols=["Yes", "No", "\n"],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
