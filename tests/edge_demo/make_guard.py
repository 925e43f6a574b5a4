"""Tunes and exports a small guard: `python -m tests.edge_demo.make_guard FOLDER`.

It learns from nothing but the rows of `examples/guard_prompts.csv`, with the notebook's `fit` and the
rows that `examples/tune_guard.py` makes. Every fourth text is held out, for tests to judge.
"""

from __future__ import annotations

import csv
import io
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
    import keras
    import transformers

    from export import export_onnx
    from gemma_keras import GemmaCausalLM
    from tests.models import hf_config

    learnt = [line for number, line in enumerate(lines()) if number % 4]
    rows = runpy.run_path(str(EXAMPLES / "tune_guard.py"))["rows_of"](learnt, seed=0)
    config = hf_config("gemma3")
    config.update(_SIZES | {"vocab_size": _PIECES})
    keras.utils.set_random_seed(0)
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "tiny-guard"
        untaught = transformers.AutoModelForCausalLM.from_config(config)
        for name, weight in untaught.named_parameters():
            if weight.ndim == 2:  # transformers' are too small for so narrow a model
                weight.data.normal_(0, 0.1 if "embed" in name else weight.shape[1] ** -0.5)
        untaught.save_pretrained(source)
        (source / "tokenizer.model").write_bytes(_tokenizer(learnt, rows))
        model = GemmaCausalLM.from_preset(
            str(source), dtype="float32", sequence_length=512, special_tokens_in_strings=True
        )
        model.compile(optimizer=keras.optimizers.Adam(float(os.environ.get("LR", "2e-3"))))
        model.fit(rows, epochs=EPOCHS, batch_size=int(os.environ.get("BS", "16")), verbose=2)
        tuned = Path(made) / "tuned"
        model.export(tuned, format="safetensors")
        export_onnx(tuned, folder, "fp32", verify=False)


EPOCHS = int(os.environ.get("EPOCHS", "10"))


def _tokenizer(texts: list[dict[str, str]], rows: list[dict[str, str]]) -> bytes:
    """A SentencePiece model with Gemma's conventions and its tokens of turns."""
    import sentencepiece

    from edge_demo.guard.template import END, START

    sentences = [line[key] for line in texts for key in ("prompt", "response") if line[key]]
    # some rows for the words of policies, whose repetition must not crowd out the others
    sentences += [part for row in rows[:8] for part in row["prompt"].split("\n") if part]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, "Yes", "No"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=_PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        control_symbols=[START, END],
        user_defined_symbols=["Yes", "No", "\n"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
