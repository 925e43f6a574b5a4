"""Tune a small guard in ShieldGemma's form with LoRA, and export it as a bundle.

python examples/tune_guard.py sample examples/guard_prompts.csv my-guard

Each line of the file has a prompt, perhaps a response, and a label, safe or unsafe; an unsafe one
has the policy that it violates. Measure the guard with `edge-demo guard-eval`, on other texts.
"""

import argparse
import csv
import random
from pathlib import Path

import keras

from edge_demo.guard.template import NO, POLICIES, YES, question
from gemma_keras import GemmaCausalLM


def rows_of(lines: list[dict], seed: int) -> list[dict]:
    """Questions with their answers: of an unsafe text the policy that it violates and another one,
    of a safe text one policy."""
    rng, rows = random.Random(seed), []
    for line in lines:
        violated = [policy for policy in POLICIES if policy.name == line["policy"]]
        others = [policy for policy in POLICIES if policy not in violated]
        for policy in [*violated, rng.choice(others)]:
            asked = question(policy, line["prompt"], line["response"] or None)
            rows.append({"prompt": asked, "completion": YES if policy in violated else NO})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a .gguf file, a Hugging Face folder or name, or 'sample'")
    parser.add_argument("prompts", type=Path, help="CSV with prompt, response, label and policy")
    parser.add_argument("out", type=Path, help="the bundle's folder, which must not exist")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; 0 tunes all weights")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--recipe", default="int8", help="of the bundle")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name another folder")

    keras.utils.set_random_seed(0)
    with arguments.prompts.open(newline="", encoding="utf-8") as file:
        rows = rows_of(list(csv.DictReader(file)), seed=0)
    model = GemmaCausalLM.from_preset(
        arguments.model,
        dtype="float32",
        sequence_length=512,
        special_tokens_in_strings=True,  # these rows have the tokens of turns in them
    )
    if arguments.rank:
        model.enable_lora(rank=arguments.rank, targets="all-linear")
    steps = arguments.epochs * len(rows) // arguments.batch_size
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.05, warmup_target=arguments.learning_rate, warmup_steps=steps // 20
    )
    model.compile(optimizer=keras.optimizers.Adam(rate, clipnorm=1.0))
    model.fit(rows, epochs=arguments.epochs, batch_size=arguments.batch_size, verbose=2)
    model.export(arguments.out, format="onnx", recipe=arguments.recipe)


if __name__ == "__main__":
    main()
