"""The same LoRA training on each backend: held-out loss of responses, and how far apart they are.

    python benchmarks/backends.py instructions.jsonl

Each line of the file has a prompt and a response. Every twentieth is held out. The model is the
sample; all backends begin with the same LoRA matrices, of rank 8 beside all matrices of the blocks,
and see the same rows in the same order. Each backend has a process of its own.

What is left between them is the order in which floats are added up. With `--seeds`, trainings begin
with other LoRA matrices too, which shows how far apart two of them are anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch")
RANK, RATE, LENGTH = 8, 5e-4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description="The same LoRA training on each backend.")
    parser.add_argument("rows", type=Path, help="JSON lines with prompt and response")
    parser.add_argument("--steps", type=int, default=200, help="of one row each")
    parser.add_argument("--parts", type=int, default=4, help="after each the loss is measured")
    parser.add_argument("--model", default="sample")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the first matrices")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(curve(arguments)))
        return
    if not arguments.rows.is_file():
        parser.error(f"{arguments.rows} is not a file")
    if arguments.steps % arguments.parts:
        parser.error(f"{arguments.steps} steps are not {arguments.parts} equal parts")
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for backend in arguments.backends:
                name = f"{backend}, seed {seed}" if len(arguments.seeds) > 1 else backend
                print(f"{name}: takes some minutes", file=sys.stderr, flush=True)
                worker = ["--worker", str(Path(folder, str(seed))), "--seeds", str(seed)]
                run = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], *worker],
                    env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                curves[name] = json.loads(run.stdout.splitlines()[-1])
                print(name, curves[name], file=sys.stderr, flush=True)
    steps = [part * arguments.steps // arguments.parts for part in range(arguments.parts + 1)]
    print("| steps | " + " | ".join(curves) + " | greatest difference |")
    print("|--:|" + "--:|" * (len(curves) + 1))
    for step, losses in zip(steps, zip(*curves.values(), strict=True), strict=True):
        shown = " | ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {step} | {shown} | {max(losses) - min(losses):.1e} |")


def curve(arguments: argparse.Namespace) -> list[float]:
    """Held-out loss before, and after each part, in nats per token."""
    import keras

    from gemma_keras import GemmaCausalLM

    keras.utils.set_random_seed(arguments.seeds[0])
    lines = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    rows = [{"prompts": line["prompt"], "responses": line["response"]} for line in lines]
    held_out = rows[::20]
    learnt = [row for number, row in enumerate(rows) if number % 20][: arguments.steps]
    if len(learnt) < arguments.steps:
        sys.exit(f"{arguments.rows} has {len(learnt)} rows to learn, fewer than steps")
    model = GemmaCausalLM.from_preset(
        arguments.model, dtype="float32", sequence_length=LENGTH, instruction_tuned=True
    )
    first = Path(arguments.worker)
    if not first.exists():
        model.enable_lora(rank=RANK, targets="all-linear")
        model.save_adapter(first)
        model.delete_adapter("default")
    model.load_adapter(first)
    model.compile(optimizer=keras.optimizers.Adam(RATE, clipnorm=1.0))
    options = {"batch_size": 1, "on_too_long": "truncate", "verbose": 0}

    def loss() -> float:
        shown = model.evaluate(held_out, pack=True, return_dict=True, **options)
        return float(shown["loss"])

    losses, size = [loss()], len(learnt) // arguments.parts
    for part in range(arguments.parts):
        model.fit(learnt[part * size : (part + 1) * size], shuffle=False, **options)
        losses.append(loss())
    return losses


if __name__ == "__main__":
    main()
