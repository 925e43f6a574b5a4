"""Teach a base model to answer in turns, with LoRA, and save the adapter.

python examples/teach_turns.py sample instructions.jsonl sample-chat

Each line of the file has a prompt and a response. Every tenth is held out: the loss of its response
is shown before and after, and how many short answers are right.
"""

import argparse
import json
from pathlib import Path

import keras

from gemma_keras import GemmaCausalLM

SHORT = 5  # words of an answer that can be compared


def conversation(row: dict) -> dict:
    turns = [("user", row["prompt"]), ("assistant", row["response"])]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def plain(text: str) -> str:
    return text.strip().strip(".\"'").lower()


def right_answers(model: GemmaCausalLM, rows: list[dict], most: int) -> str:
    short = [row for row in rows if len(row["response"].split()) <= SHORT][:most]
    right = ended = 0
    for row in short:
        length = len(model.preprocessor.tokenizer.encode(row["prompt"])) + 48
        answer = model.chat(
            row["prompt"], max_length=min(length, model.preprocessor.sequence_length)
        )
        right += plain(answer) == plain(row["response"])
        ended += len(answer.split()) <= 3 * SHORT
    return f"{right} of {len(short)} short answers are right, {ended} end in time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a .gguf file, a Hugging Face folder or name, or 'sample'")
    parser.add_argument("rows", type=Path, help="JSON lines with prompt and response")
    parser.add_argument("out", type=Path, help="the adapter's folder, which must not exist")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--answers", type=int, default=60, help="short answers that are compared")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name another folder")
    if not arguments.rows.is_file():
        parser.error(f"{arguments.rows} is not a file")

    keras.utils.set_random_seed(0)
    lines = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    held_out = lines[::10]
    learnt = [line for number, line in enumerate(lines) if number % 10]
    model = GemmaCausalLM.from_preset(
        arguments.model,
        dtype="float32",
        sequence_length=arguments.sequence_length,
        instruction_tuned=True,
    )
    shown = {"batch_size": arguments.batch_size, "pack": True, "verbose": 2}
    before = model.evaluate(list(map(conversation, held_out)), return_dict=True, **shown)
    print("before:", before, right_answers(model, held_out, arguments.answers), flush=True)

    model.enable_lora(rank=arguments.rank, targets="all-linear")
    # About as many steps as there will be, at four letters a token. Later ones are small.
    tokens = sum(len(row["prompt"] + row["response"]) for row in learnt) // 4
    of_an_epoch = tokens // (arguments.batch_size * arguments.sequence_length)
    steps = arguments.epochs * max(of_an_epoch, 20)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.05, warmup_target=arguments.learning_rate, warmup_steps=steps // 20
    )
    model.compile(optimizer=keras.optimizers.Adam(rate, clipnorm=1.0))
    model.fit(list(map(conversation, learnt)), epochs=arguments.epochs, **shown)
    model.save_adapter(arguments.out, dtype="bfloat16")  # half of float32's bytes
    after = model.evaluate(list(map(conversation, held_out)), return_dict=True, **shown)
    print("after:", after, right_answers(model, held_out, arguments.answers), flush=True)
    print("Hello! Who are you?", "->", model.chat("Hello! Who are you?", max_length=96))


if __name__ == "__main__":
    main()
