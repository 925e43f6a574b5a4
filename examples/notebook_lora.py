"""Load a model, tune it with LoRA, generate, and export a bundle.

python examples/notebook_lora.py sample tuned-bundle
python examples/notebook_lora.py google/gemma-3-1b-it tuned-bundle --epochs 3
"""

import argparse
from pathlib import Path

from gemma_keras import GemmaCausalLM

ROWS = [
    {"prompt": "Q: What do bees make? A:", "completion": " Honey."},
    {"prompt": "Q: What do cows give? A:", "completion": " Milk."},
    {"prompt": "Q: What do hens lay? A:", "completion": " Eggs."},
    {"prompt": "Q: What do sheep give? A:", "completion": " Wool."},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a .gguf file, a Hugging Face folder or name, or 'sample'")
    parser.add_argument("out", help="the bundle's folder, which must not exist")
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    if Path(arguments.out).exists():
        parser.error(f"{arguments.out} exists; name another folder")

    model = GemmaCausalLM.from_preset(arguments.model, sequence_length=64)
    prompt = "Q: What do ducks lay? A:"
    print("before:", model.generate(prompt, max_length=64))

    model.enable_lora(rank=4)
    model.fit(ROWS, epochs=arguments.epochs, batch_size=2)
    print("after:", model.generate(prompt, max_length=64))

    result = model.export(arguments.out, format="onnx", recipe="int8")
    print(f"wrote {result.path}: {result.num_bytes / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
