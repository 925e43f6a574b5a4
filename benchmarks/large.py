"""Exports of models too large for memory: time, peak memory and size, on random bfloat16 weights.

    python benchmarks/large.py gemma_2b --folder build/large --recipe int8 --bench

Writes a Hugging Face folder of the named size with random weights (5 GB for 2B, 17 GB for 7B, shard
by shard), exports it, with `--no-verify` without running it, and prints one JSON line: seconds, the
exporter's peak memory beside the largest tensor, the bundle's size, and with `--bench` what
`edge-demo bench` finds. The quality of random weights means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2

from edge_demo.cli.terminal import Progress
from gemma_keras import GemmaConfig, open_checkpoint
from gemma_keras.checkpoints.hf.config import config_to_hf, named_config
from gemma_keras.checkpoints.names import WeightSpec, weight_specs

_PIECE = 1 << 24
_SPREAD = 0.02


def write_checkpoint(name: str, folder: Path, layers: int | None = None) -> GemmaConfig:
    """A Hugging Face folder of a named size with random weights; kept if it is there.

    Args:
        name: of a published size.
        folder: to write.
        layers: how many of its blocks it has; all by default.
    """
    config = named_config(name)
    config = dataclasses.replace(config, layers=config.layers[:layers])
    if folder.exists():
        return config
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: dict[str, list[WeightSpec]] = {}
    for spec in weight_specs(config).values():
        shard = spec.name.split(".")[1] if spec.name.startswith("layers.") else spec.name
        shards.setdefault(shard, []).append(spec)
    rng = np.random.default_rng(0)
    told, owner = Progress("shard"), {}
    for number, (shard, specs) in enumerate(shards.items()):
        file = f"model-{shard}.safetensors"
        tensors = {spec.hf: _random(spec, rng) for spec in specs}
        save_file(tensors, partial / file, metadata={"format": "pt"})
        owner |= dict.fromkeys(tensors, file)
        told(number + 1, len(shards))
    index = {"metadata": {}, "weight_map": owner}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "config.json").write_text(json.dumps(config_to_hf(config)))
    (partial / "tokenizer.model").write_bytes(_tokenizer(config.vocabulary_size))
    partial.rename(folder)
    return config


def _random(spec: WeightSpec, rng: np.random.Generator) -> np.ndarray:
    out = np.empty(spec.file_shape, ml_dtypes.bfloat16)
    flat = out.reshape(-1)
    for first in range(0, flat.size, _PIECE):
        piece = flat[first : first + _PIECE]
        piece[:] = rng.standard_normal(piece.size, np.float32) * np.float32(_SPREAD)
    return out


def _tokenizer(size: int) -> bytes:
    """The sample's tokenizer, cut to a size."""
    model = sentencepiece_model_pb2.ModelProto.FromString(open_checkpoint("sample").tokenizer_model)
    del model.pieces[size:]
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command, its children not counted."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            peak = max(peak, int(fields["VmHWM"].split()[0]) * 1024)
        except (OSError, KeyError):
            pass
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    return time.monotonic() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", help="such as gemma_2b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="only the first so many blocks")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--bench", action="store_true", help="run the bundle too")
    parser.epilog = "All other arguments go to export-onnx."
    arguments, others = parser.parse_known_args()

    name = arguments.size + (f"-{arguments.layers}-layers" if arguments.layers else "")
    source = arguments.folder / name
    config = write_checkpoint(arguments.size, source, arguments.layers)
    bundle = arguments.folder / f"{name}-{arguments.recipe}"
    scripts = Path(sys.executable).parent
    export = [scripts / "export-onnx", source, bundle, "--recipe", arguments.recipe, "--overwrite"]
    seconds, peak = run([str(part) for part in (*export, *others)])
    largest = max(int(np.prod(spec.shape)) for spec in weight_specs(config).values())
    result = {
        "size": name,
        "recipe": arguments.recipe,
        "seconds": round(seconds),
        "peak_bytes": peak,
        "largest_tensor_float32_bytes": 4 * largest,
        "peak_beyond_largest_bytes": peak - 4 * largest,
        "bundle_bytes": sum(file.stat().st_size for file in bundle.iterdir()),
    }
    if arguments.bench:
        command = [scripts / "edge-demo", "bench", bundle, "--json", "--prompt-tokens", "128"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        result["bench"] = json.loads(done.stdout)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
