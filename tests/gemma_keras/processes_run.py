"""What `test_processes.py` runs: alone, or as one of two processes that train one model.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 KERAS_BACKEND=jax \\
        python -m tests.gemma_keras.processes_run FOLDER [ADDRESS PROCESS]

`FOLDER` holds a small model as `tests.models` writes it, and takes weights that are learnt. Both
processes run the same lines on the same rows. The last line that is printed is JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np

from gemma_keras import GemmaCausalLM
from gemma_keras.model import distribute
from tests.models import TEXT

PROCESSES, DEVICES = 2, 2  # so many processes, with so many devices each
LINES = TEXT.splitlines()
ROWS: list[Any] = [
    *LINES[:5],
    *({"prompt": line[:12], "completion": line[12:40]} for line in LINES),
]
HELD_OUT = LINES[5:]
# Mesh, and what is done on it. Neither 13 rows nor these batches divide by the parts of a batch.
CASES: dict[str, dict[str, Any]] = {
    "data": {"mesh": {"data": 4}, "batch_size": 5, "accumulated": 2, "held_out": HELD_OUT},
    "model": {"mesh": {"model": 4}, "batch_size": 2, "pack": True},
    "both": {
        "mesh": {"data": 2, "model": 2, "shard_parameters_over_data": True},
        "batch_size": 3,
        "pack": True,
        "lora": True,
    },
    # Each process holds a half of both models, and so brings all rows.
    "across": {
        "mesh": {"data": 2, "model": 2, "devices": (0, 2, 1, 3)},
        "batch_size": 3,
        "epochs": 0,
    },
}


def use(mesh: dict[str, Any] | None) -> None:
    """Let models that are made from now on lie on a mesh; its devices are numbers in a list."""
    made = None
    if mesh is not None:
        devices = keras.distribution.list_devices()
        numbers = mesh.get("devices", range(len(devices)))
        made = distribute.distribution(**mesh | {"devices": [devices[i] for i in numbers]})
    keras.distribution.set_distribution(made)


def weights_of(model) -> list[np.ndarray]:
    """Whole arrays, also where a process holds a part."""
    from jax.experimental.multihost_utils import process_allgather

    values = [variable.value for variable in model.trainable_variables]
    return [
        np.asarray(value if value.is_fully_replicated else process_allgather(value, tiled=True))
        for value in values
    ]


def loaded(folder: Path, lora: bool = False, accumulated: int | None = None):
    """The model, compiled; all its variables come out the same on each mesh."""
    keras.utils.set_random_seed(1)
    model = GemmaCausalLM.from_preset(folder, dtype="float32", sequence_length=64)
    if lora:
        model.enable_lora(rank=4, targets=["query", "down"], dropout=0.1)
    # An epsilon so large that Adam does not make a step of a gradient that is nothing but rounding.
    adam = keras.optimizers.Adam(1e-2, epsilon=1e-3, gradient_accumulation_steps=accumulated)
    model.compile(optimizer=adam)
    return model


def learnt(
    folder: Path,
    batch_size: int,
    pack: bool = False,
    lora: bool = False,
    accumulated: int | None = None,
    held_out: list[Any] | None = None,
    epochs: int = 2,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What `fit` and `evaluate` say, how far weights have moved, and the weights."""
    model = loaded(folder, lora, accumulated)
    before = weights_of(model)
    np.random.seed(jax.process_index())  # each process would draw another order of rows
    options: dict[str, Any] = {"batch_size": batch_size, "pack": pack}
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if epochs:
            history = model.fit(ROWS, epochs=epochs, validation_data=held_out, **options)
            found["history"] = history.history
        found["evaluated"] = model.evaluate(ROWS, return_dict=True, **options)
    after = weights_of(model)
    found["moved"] = max(float(np.abs(a - b).max()) for a, b in zip(after, before, strict=True))
    found["printed"] = bool(printed.getvalue())
    return found, after


def refusals(folder: Path) -> dict[str, str]:
    """What cannot be done in several processes, and what is said of it."""
    use(CASES["data"]["mesh"])
    model, other = loaded(folder), loaded(folder)
    other.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    unlike = ROWS[jax.process_index() :]
    tried: dict[str, Callable[[], Any]] = {
        "unlike rows": lambda: model.evaluate(unlike, batch_size=4, verbose=0),
        "uneven batches": lambda: other.fit(ROWS, batch_size=5, verbose=0),
        "an uneven last batch": lambda: other.fit(ROWS, batch_size=4, verbose=0),
        "checkpoint_dir": lambda: model.fit(ROWS, checkpoint_dir=folder / "state", verbose=0),
    }
    found = dict.fromkeys(tried, "nothing was refused")
    for name, call in tried.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


def main(folder: Path, address: str | None = None, process: str = "0") -> None:
    if address is not None:
        keras.distribution.initialize(address, PROCESSES, int(process))
    alone = address is None
    found: dict[str, Any] = {"devices": jax.device_count(), "cases": {}}
    for name, case in CASES.items():
        options = dict(case)
        mesh = options.pop("mesh")
        use(None if alone else mesh)
        found["cases"][name], weights = learnt(folder, **options)
        if process == "0":
            file = f"{'one' if alone else 'two'}-{name}.npz"
            np.savez(folder / file, *weights)
    if not alone:
        found["refused"] = refusals(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
