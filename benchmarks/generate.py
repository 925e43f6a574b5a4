"""`generate` in Keras, side by side with KerasHub on each backend and with transformers.

    python benchmarks/generate.py --rounds 3

A random model of the shape of Gemma 3 270M in float32 continues a prompt of 512 tokens by 64,
greedily. Every contender has a process of its own; they take turns, and medians are printed, as one
JSON line: seconds, of the first call (which compiles) and of later ones, seconds after another
length of prompt (500 tokens, then 510), and times KerasHub's speed on the same backend.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from edge_demo.cli.terminal import Progress
from gemma_keras.checkpoints.hf.config import config_to_hf, named_config

PROMPT, NEW = 512, 64
BACKENDS = ("jax", "tensorflow", "torch")
_SIZE = "gemma3_270m"


def contenders(backends: list[str]) -> list[tuple[str, str]]:
    """Pairs of a project and a backend."""
    pairs = [(who, backend) for backend in backends for who in ("gemma_keras", "keras_hub")]
    return [*pairs, ("transformers", "torch")] if "torch" in backends else pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    result = {}
    for backend in arguments.backends:
        pairs = contenders([backend])
        told = Progress(f"{backend}: round")
        workers = {pair: Worker(*pair) for pair in pairs}
        for worker in workers.values():
            worker.wait()
        first = {pair: worker.seconds(PROMPT) for pair, worker in workers.items()}
        times: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
        for number in range(arguments.rounds):
            for pair in pairs:
                times[pair].append(workers[pair].seconds(PROMPT))
            told(number + 1, arguments.rounds)
        other = {p: [w.seconds(500), w.seconds(510)] for p, w in workers.items()}
        for worker in workers.values():
            worker.end()
        base = statistics.median(times["keras_hub", backend])
        for pair in pairs:
            middle = statistics.median(times[pair])
            result["/".join(pair)] = {
                "first_call_seconds": round(first[pair], 2),
                "seconds": round(middle, 2),
                "seconds_after_500_then_510_tokens": [round(t, 2) for t in other[pair]],
                "times_keras_hub": round(base / middle, 2),
            }
    print(json.dumps({"prompt": PROMPT, "new_tokens": NEW, "dtype": "float32"} | result))


class Worker:
    """A contender in a process of its own, which waits while others have their turn."""

    def __init__(self, who: str, backend: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", who, backend],
            env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Until its model is made, so that nobody is timed while others import."""
        assert self._process.stdout
        self._process.stdout.readline()

    def seconds(self, length: int) -> float:
        """How long one call with a prompt of that length takes."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{length}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """Let the process go."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def work(who: str, backend: str) -> None:
    """Run prompts of the lengths that come in; print the seconds."""
    generate = {
        "gemma_keras": gemma_keras_model,
        "keras_hub": keras_hub_model,
        "transformers": transformers_model,
    }[who]()
    print("ready", flush=True)
    for line in sys.stdin:
        ids = np.random.default_rng(int(line)).integers(4, 200_000, (1, int(line))).astype("int32")
        start = time.perf_counter()
        found = generate(ids)
        seconds = time.perf_counter() - start
        assert len(found) == int(line) + NEW, len(found)
        print(seconds, flush=True)


def padded(ids: np.ndarray) -> dict[str, np.ndarray]:
    """A prompt with room for what is to come."""
    room = ((0, 0), (0, NEW))
    return {"token_ids": np.pad(ids, room), "padding_mask": np.pad(np.ones_like(ids), room)}


def gemma_keras_model():
    """Ours."""
    from gemma_keras import GemmaBackbone, GemmaCausalLM

    model = GemmaCausalLM(GemmaBackbone(_SIZE, dtype="float32"))
    model.compile(sampler="greedy")
    return lambda ids: model.generate(padded(ids), stop_token_ids=None)["token_ids"][0]


def keras_hub_model():
    """KerasHub's."""
    import keras

    from gemma_keras import GemmaBackbone, GemmaCausalLM

    model = GemmaCausalLM(GemmaBackbone(_SIZE, dtype="float32")).to_keras_hub("float32")
    model.compile(sampler="greedy")
    # Its `generate` itself wants a preprocessor: without one it concatenates images that are None.
    generate = model.make_generate_function()

    def run(ids):
        found = generate(padded(ids), stop_token_ids=None)["token_ids"]
        return keras.ops.convert_to_numpy(found)[0]

    return run


def transformers_model():
    """Hugging Face's, on PyTorch."""
    import torch
    import transformers

    config = transformers.Gemma3TextConfig(**config_to_hf(named_config(_SIZE)))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # No end: to forbid it by `min_new_tokens` would cost a pass over the logits for each token.
    model.generation_config.eos_token_id = None

    def generate(ids):
        tokens = torch.tensor(ids, dtype=torch.int64)
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            do_sample=False,
        )[0]

    return generate


if __name__ == "__main__":
    main()
