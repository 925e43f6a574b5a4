"""Memory and time of loading a model into Keras, and of one token.

    python benchmarks/loading.py gemma_2b --folder build/large --dtype bfloat16 --backend jax torch

Writes a Hugging Face folder of the named size with random weights unless it is there (5 GB for 2B),
and for each backend starts a process that loads it and generates one token. Prints a JSON line for
each: the bytes of the parameters, then seconds and peak resident memory when everything is
imported, when the model is loaded, and when it has made a token. `cost` is what loading added to
the peak and what both added, by the parameters' bytes. Peaks include some 0.9 GB that importing
TensorFlow (by way of KerasHub) and the backend takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch")


def measure(size: str, folder: Path, dtype: str) -> dict:
    """What one process finds, on the backend of its environment."""
    from edge_demo.device.memory_limits import peak_rss_bytes

    start = time.monotonic()
    import keras
    import numpy as np

    from gemma_keras import GemmaCausalLM

    result: dict = {"size": size, "dtype": dtype, "backend": keras.config.backend()}

    def note(what: str) -> None:
        result[f"{what}_seconds"] = round(time.monotonic() - start, 1)
        result[f"{what}_peak_bytes"] = peak_rss_bytes()

    note("imported")
    model = GemmaCausalLM.from_preset(folder, dtype=dtype)
    note("loaded")
    item = {"bfloat16": 2, "float16": 2}.get(dtype, 4)
    result["parameter_bytes"] = item * model.count_params()
    prompt = np.zeros((1, 9), np.int32)
    prompt[0, :8] = np.arange(2, 10)
    mask = (np.arange(9) < 8).astype(np.int32)[None]
    model.preprocessor = None
    model.generate({"token_ids": prompt, "padding_mask": mask}, stop_token_ids=None)
    note("token")
    for what in ("loaded", "token"):
        added = result[f"{what}_peak_bytes"] - result["imported_peak_bytes"]
        result[f"{what}_cost"] = round(added / result["parameter_bytes"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", help="such as gemma_2b")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written")
    parser.add_argument("--dtype", default="bfloat16", help="a Keras dtype policy")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = arguments.folder / arguments.size
    if arguments.here:
        print(json.dumps(measure(arguments.size, source, arguments.dtype)))
        return
    if not source.exists():
        from benchmarks.large import write_checkpoint

        write_checkpoint(arguments.size, source)
    for backend in arguments.backend:
        command = [sys.executable, __file__, arguments.size, "--here"]
        command += ["--folder", str(arguments.folder), "--dtype", arguments.dtype]
        quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
        subprocess.run(command, env=os.environ | quiet, check=True)


if __name__ == "__main__":
    main()
