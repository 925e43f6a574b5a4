"""A bundle against the Keras model it came from: logits at every position, and greedy tokens.

    python benchmarks/parity.py build/sample-fp32 sample --text LICENSE

Prints one JSON line. The backend is that of KERAS_BACKEND.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import keras
import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.text.tokenizer import Tokenizer
from gemma_keras import GemmaCausalLM

LENGTHS = (5, 40, 300, 700)
NEW_TOKENS = 24
TIE = 0.01  # greedy tokens may differ where the reference's two best logits are this near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("source", help="what the bundle was exported from")
    parser.add_argument("--text", required=True, type=Path)
    arguments = parser.parse_args()

    bundle = Bundle.open(arguments.bundle)
    engine = Engine(bundle)
    text = Tokenizer(bundle).encode(arguments.text.read_text(encoding="utf-8"))
    model = GemmaCausalLM.from_preset(arguments.source, dtype="float32")
    result = {"bundle": bundle.recipe, "backend": keras.config.backend(), "prompts": []}
    for length in LENGTHS:
        ids = text[:length]
        engine.rewind(0)
        reference = model.logits(np.array([ids], np.int32))[0]
        found = np.concatenate(list(engine.all_logits(ids)))
        entry = {
            "tokens": length,
            "max_logit_difference": float(np.abs(reference - found).max()),
            "logit_std": float(reference[-1].std()),
            "same_top_token": float((reference.argmax(-1) == found.argmax(-1)).mean()),
        }
        if length < 512:
            entry["greedy"] = compare_greedy(model, engine, ids)
        result["prompts"].append(entry)
    print(json.dumps(result))


def compare_greedy(model: GemmaCausalLM, engine: Engine, ids: list[int]) -> str:
    """How the two continuations compare, each step of the reference judged by its margin."""
    engine.rewind(0)
    tokens = list(ids)
    logits = engine.prefill(ids)
    for _ in range(NEW_TOKENS):
        tokens.append(int(logits.argmax()))
        logits = engine.decode(tokens[-1])
    # One call over the engine's own tokens gives the reference's choice at every step.
    reference = model.logits(np.array([tokens[:-1]], np.int32))[0, len(ids) - 1 :]
    second, best = np.sort(np.partition(reference, -2)[:, -2:]).T
    wrong = reference.argmax(-1) != tokens[len(ids) :]
    if not wrong.any():
        return f"{NEW_TOKENS} of {NEW_TOKENS} equal, smallest margin {(best - second).min():.3f}"
    where = int(wrong.argmax())
    tie = best[where] - second[where] <= TIE
    return f"differ at step {where}{' (a tie)' if tie else ''}"


if __name__ == "__main__":
    main()
