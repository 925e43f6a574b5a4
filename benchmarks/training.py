"""A training step of a Gemma 3 270M, side by side with KerasHub on each backend and with TRL.

    python benchmarks/training.py --rounds 3 --trl-python trl-env/bin/python

The model has random float32 weights and the whole vocabulary. A step is one row of 512 or 2,048
tokens, all of which count. Methods: `full` trains all weights. `lora` trains matrices of rank 8
beside all matrices of the blocks. `int8` and `int4` do the same on quantized weights (QLoRA); our
token table is in int8 then, KerasHub's stays in float.

Contenders are this project and KerasHub's `Gemma3CausalLM.fit` on each backend, and on PyTorch
TRL's `SFTTrainer` with PEFT. Each has a process of its own, alone on the machine; they take turns,
and medians are printed. `+ checkpointing` computes what is within blocks again for the gradients.

Seconds are those of a step after the first, which compiles. Memory is resident: after the imports,
with the model loaded, and its peaks while it is loaded and in steps. Ratios are of the latter.
A contender over `--limit-gb` is ended and reported. With `--results` what has been measured is
kept in a file, and is not measured again. TRL may be in an environment of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BACKENDS = ("jax", "tensorflow", "torch")
METHODS = ("full", "lora", "int8", "int4")
RANK = 8
_SIZE = "gemma3_270m"
_QUICK = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "num_hidden_layers": 6,
    "vocab_size": 4096,
}
_PEERS = {"keras_hub": "KerasHub", "trl": "TRL"}
_NAMES = {"gemma_keras": "Gemma Keras", **_PEERS}
# KerasHub's names of all matrices of its blocks.
_KERAS_HUB_MATRICES = [
    *("query", "key", "value", "attention_output"),
    *("ffw_gating", "ffw_gating_2", "ffw_linear"),
]


class Contender(NamedTuple):
    """What one process measures."""

    who: str
    backend: str
    method: str
    length: int
    checkpointing: bool

    @property
    def name(self) -> str:
        """For people."""
        return _NAMES[self.who] + (" + checkpointing" if self.checkpointing else "")


def contenders(arguments: argparse.Namespace) -> Iterator[Contender]:
    """All of them, those of one backend, method and length beside each other."""
    for length in arguments.lengths:
        for backend in arguments.backends:
            for method in arguments.methods:
                for who in arguments.who:
                    if who == "trl" and (backend != "torch" or method not in ("full", "lora")):
                        continue
                    yield Contender(who, backend, method, length, False)
                    if who != "keras_hub" and length == max(arguments.lengths):
                        yield Contender(who, backend, method, length, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed ones; 0 for memory")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, metavar="TOKENS")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--who", nargs="+", default=list(_NAMES), choices=list(_NAMES))
    parser.add_argument("--trl-python", default=sys.executable, help="the Python that has TRL")
    parser.add_argument("--limit-gb", type=float, default=14, help="most memory of a process")
    parser.add_argument("--limit-s", type=float, default=900, help="most seconds of a process")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to keep and go on with")
    parser.add_argument("--quick", action="store_true", help="a small model, to test this script")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(**arguments.worker)))
        return
    arguments.lengths = arguments.lengths or ([64, 128] if arguments.quick else [512, 2048])
    config = hf_config(arguments.quick)
    found: dict[Contender, list[dict[str, Any]]] = {one: [] for one in contenders(arguments)}
    kept = arguments.results
    if kept and kept.exists():
        for line in map(json.loads, kept.read_text().splitlines()):
            found.setdefault(Contender(*line["contender"]), []).append(line["result"])
    for number in range(arguments.rounds):
        for one, results in found.items():
            if len(results) > number or any("missing" in result for result in results):
                continue
            results.append(measured(one, config, arguments))
            line = json.dumps({"contender": one, "result": results[-1]})
            print(line, file=sys.stderr, flush=True)
            if kept:
                with kept.open("a") as file:
                    file.write(line + "\n")
    medians = {one: median_of(results) for one, results in found.items() if results}
    print(f"{processor()}, {os.cpu_count()} threads\n")
    for length in sorted({one.length for one in medians}):
        print("\n".join(table(length, medians)), end="\n\n")


def hf_config(quick: bool) -> dict[str, Any]:
    """Of the model, as in `config.json`, which every contender builds its own from."""
    from gemma_keras.sizes import SIZES

    return dict(SIZES[_SIZE].hf) | (_QUICK if quick else {})


def measured(one: Contender, config: dict[str, Any], arguments: argparse.Namespace) -> dict:
    """What a process of its own finds, or what is missing.

    Resident memory is watched: a limit of address space would refuse what is reserved only.
    """
    job = one._asdict() | {"config": config, "steps": arguments.steps}
    python = arguments.trl_python if one.who == "trl" else sys.executable
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [python, __file__, "--worker", json.dumps(job)],
            env=os.environ | {"KERAS_BACKEND": one.backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=out,
            stderr=said,
            text=True,
        )
        end, missing = time.monotonic() + arguments.limit_s, None
        while process.poll() is None and not missing:
            if memory("VmRSS", process.pid) > arguments.limit_gb * 1e9:
                missing = f"needs more than {arguments.limit_gb:g} GB"
            elif time.monotonic() > end:
                missing = f"takes more than {arguments.limit_s:g} s"
            time.sleep(0.05)
        if missing:
            process.kill()
        if process.wait() and not missing:
            said.seek(0)
            missing = (said.read().strip().splitlines() or ["it ended"])[-1]
        if missing:
            return {"missing": missing}
        out.seek(0)
        return json.loads(out.read().splitlines()[-1])


def memory(field: str, process: int | str = "self") -> int:
    """Bytes of a field of a process's status; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields[field].split()[0]) * 1024 if field in fields else 0


# --- one process ---------------------------------------------------------------------------------


def work(who: str, method: str, length: int, checkpointing: bool, config: dict, steps: int, **_):
    """Make a model, train it for some steps, and tell seconds and bytes."""
    made = {"gemma_keras": gemma_keras_step, "keras_hub": keras_hub_step, "trl": trl_step}[who]
    build = made()
    imported = memory("VmRSS")
    train = build(config, method, checkpointing)
    gc.collect()
    loaded, peak_loading = memory("VmRSS"), memory("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    rows = np.random.default_rng(0).integers(4, config["vocab_size"], (1 + steps, length + 1))
    begin = time.perf_counter()
    ends = train(rows.astype("int32"))
    assert len(ends) == 1 + steps, ends
    peak_steps = memory("VmHWM")
    return {
        "first": ends[0] - begin,
        "step": statistics.median(np.diff(ends).tolist() or [math.nan]),
        "imported": imported,
        "loaded": loaded,
        "peak_loading": peak_loading,
        "peak_steps": peak_steps,
    }


def gemma_keras_step() -> Callable:
    """Ours."""
    from gemma_keras import GemmaBackbone, GemmaCausalLM
    from gemma_keras.checkpoints.hf.config import config_from_hf
    from gemma_keras.checkpoints.names import weight_specs
    from gemma_keras.checkpoints.source import NamedWeights
    from gemma_keras.model.loading import FromWeights

    class Random(NamedWeights):
        """Weights that are made when they are read, a table in chunks, as from a checkpoint."""

        def __init__(self, config):
            self.specs = weight_specs(config)
            self._rng = np.random.default_rng(0)

        def _values(self, *shape):
            return self._rng.standard_normal(shape, np.float32) * np.float32(0.02)

        def __getitem__(self, name):
            return self._values(*self.specs[name].shape)

        def table_chunks(self, name, chunk_bytes):
            rows, width = self.specs[name].file_shape
            step = chunk_bytes // (4 * width)
            for first in range(0, rows, step):
                yield first, self._values(min(step, rows - first), width)

    def build(config, method, checkpointing):
        config = config_from_hf(config)
        backbone = GemmaBackbone(
            config,
            dtype="float32",
            kernel_initializer=FromWeights(Random(config)),
            gradient_checkpointing=checkpointing,
        )
        model = GemmaCausalLM(backbone)
        if method in ("int8", "int4"):
            with warnings.catch_warnings(action="ignore"):  # the table comes next
                model.quantize(method)
            model.quantize("int8", filters="token_embedding")
        if method != "full":
            model.enable_lora(RANK, targets="all-linear")
        return keras_train(model)

    return build


def keras_hub_step() -> Callable:
    """KerasHub's."""
    import keras_hub

    from gemma_keras.checkpoints.hf.config import config_from_hf
    from gemma_keras.keras_hub.config import config_to_keras_hub

    def build(config, method, checkpointing):
        arguments = config_to_keras_hub(config_from_hf(config))
        backbone = keras_hub.models.Gemma3Backbone(**arguments, dtype="float32")
        model = keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=None)
        if method in ("int8", "int4"):
            model.quantize(method)
        if method != "full":
            model.backbone.enable_lora(RANK, target_layer_names=_KERAS_HUB_MATRICES)
        return keras_train(model)

    return build


def keras_train(model) -> Callable:
    """`fit` of either, and when each step ended."""
    import keras

    ends: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])  # waits for it
            ends.append(time.perf_counter())

    def train(rows):
        x = {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, :-1])}
        weights = np.ones(rows[:, 1:].shape, "float32")
        options = {"batch_size": 1, "callbacks": [Clock()], "verbose": 0}
        model.fit(x, rows[:, 1:], sample_weight=weights, **options)
        return ends

    return train


def trl_step() -> Callable:
    """TRL's, with transformers and PEFT."""
    import tokenizers
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def build(config, method, checkpointing):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma3TextConfig(**config), dtype=torch.float32
        )
        lora = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
        # SFTTrainer wants a tokenizer, also for rows that are ids already.
        words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
        )
        options = {"gradient_checkpointing": checkpointing, "bf16": False, "use_cpu": True}
        options |= dict.fromkeys(("save_strategy", "logging_strategy"), "no")
        options |= {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 1}

        def train(rows):
            with tempfile.TemporaryDirectory() as folder:
                steps, length = len(rows), rows.shape[1] - 1
                trainer = trl.SFTTrainer(
                    model,
                    trl.SFTConfig(folder, max_steps=steps, max_length=length, **options),
                    train_dataset=Dataset.from_dict({"input_ids": rows[:, :-1].tolist()}),
                    processing_class=tokenizer,
                    peft_config=LoraConfig(**lora) if method == "lora" else None,
                    callbacks=[Clock()],
                )
                trainer.train()
            return ends

        return train

    return build


# --- what is printed -----------------------------------------------------------------------------


def median_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure; or what is missing."""
    for result in results:
        if "missing" in result:
            return result
    return {name: statistics.median(r[name] for r in results) for name in results[0]}


def table(length: int, medians: dict[Contender, dict[str, Any]]) -> Iterator[str]:
    """Markdown, with ratios: of speeds, and of peak memory.

    A ratio above 1 of speed and one below 1 of memory are in favour of the row's contender.
    """
    heads = ["first step, s", "step, s", "imports, MB", "loaded, MB", "peak loading, MB"]
    heads += ["peak of steps, MB"]
    heads += [f"speed and memory / {name}" for name in _PEERS.values()] + ["memory / LoRA"]
    yield f"1 x {length}:\n"
    yield "| backend | method | contender | " + " | ".join(heads) + " |"
    yield "|---|---|---|" + "--:|" * len(heads)
    for one, figures in medians.items():
        if one.length != length:
            continue
        row = [one.backend, one.method, one.name]
        if "missing" in figures:
            row += [f"not measured: {figures['missing']}"] + [""] * (len(heads) - 1)
        else:
            row += [f"{figures[name]:.2f}" for name in ("first", "step")]
            names = ("imported", "loaded", "peak_loading", "peak_steps")
            row += [f"{figures[name] / 1e6:,.0f}" for name in names]
            for who in _PEERS:
                peer = medians.get(one._replace(who=who, checkpointing=False), {})
                shown = "step" in peer and who != one.who
                row.append(ratios(figures, peer) if shown else "")
            lora = medians.get(one._replace(method="lora"), {})
            quantized = one.method in ("int8", "int4") and "peak_steps" in lora
            row.append(f"{figures['peak_steps'] / lora['peak_steps']:.2f}" if quantized else "")
        yield "| " + " | ".join(row) + " |"


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Of speed and of the peak memory of steps."""
    return f"{theirs['step'] / ours['step']:.2f}, {ours['peak_steps'] / theirs['peak_steps']:.2f}"


def processor() -> str:
    """Its name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "an unknown processor"


if __name__ == "__main__":
    main()
