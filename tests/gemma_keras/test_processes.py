"""Two processes that train one model, on rows, learn what one process learns: see `processes_run.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_keras.train.processes import part_of
from tests.gemma_keras.processes_run import CASES, DEVICES, PROCESSES
from tests.models import shallow, write_tiny_hf

pytestmark = [pytest.mark.keras, pytest.mark.backends("jax")]

ROOT = Path(__file__).parents[2]
# Sums over devices are taken in another order than on one: some units of float32's last place.
LOSS, WEIGHTS = 1e-5, 5e-6
LEARNT = [name for name, case in CASES.items() if case.get("epochs", 2)]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.gemma_keras.processes_run", str(folder), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder, what one process said, and what each of two did."""
    folder = tmp_path_factory.mktemp("processes")
    write_tiny_hf(folder, "gemma3", **shallow("gemma3"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [start(folder, address, str(i)) for i in range(PROCESSES)]
    started.append(start(folder))
    try:
        *two, one = [result(process) for process in started]
    finally:
        for process in started:
            process.kill()
    return folder, one["cases"], two


@pytest.mark.parametrize("case", LEARNT)
def test_two_processes_learn_what_one_learns(runs, case, record_property):
    folder, one, two = runs
    weights = [np.load(folder / f"{many}-{case}.npz").values() for many in ("one", "two")]
    off = max(float(np.abs(a - b).max()) for a, b in zip(*weights, strict=True))
    losses = one[case]["history"]["loss"]
    record_property(case, f"losses {losses}, weights off by {off:.1e}")
    assert losses[1] < losses[0] - 0.1
    for found in two:
        assert found["devices"] == PROCESSES * DEVICES
        history = found["cases"][case]["history"]
        assert history.keys() == one[case]["history"].keys() >= {"loss", "perplexity"}
        for name, values in one[case]["history"].items():
            # A loss's error is that of the exponent of its perplexity.
            near = LOSS * (losses[0] if "perplexity" in name else 1)
            assert history[name] == pytest.approx(values, rel=near), name
    assert one[case]["moved"] > 1e3 * WEIGHTS
    assert off < WEIGHTS


@pytest.mark.parametrize("case", CASES)
def test_two_processes_measure_what_one_measures(runs, case):
    _, one, two = runs
    for found in two:
        for name, value in one[case]["evaluated"].items():
            near = LOSS * (10 if name == "perplexity" else 1)
            assert found["cases"][case]["evaluated"][name] == pytest.approx(value, rel=near)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_print_once(runs, case):
    _, _, two = runs
    assert [found["cases"][case]["printed"] for found in two] == [True, False]


@pytest.mark.parametrize(
    ("tried", "said"),
    [
        ("unlike rows", "the processes were given different rows"),
        ("uneven batches", "a batch of 5 rows does not divide by the 4 parts"),
        ("an uneven last batch", "a batch of 1 rows does not divide by the 4 parts"),
        ("checkpoint_dir", "checkpoint_dir is for one process, but several train this model"),
    ],
)
def test_two_processes_are_refused_what_they_cannot_do(runs, tried, said):
    for found in runs[2]:
        assert found["refused"][tried].startswith(said)


# --- which rows a process brings -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("holders", "parts"),
    [
        ([0, 0, 1, 1], [[0, 1], [2, 3]]),
        ([[0, 0], [1, 1]], [[0], [1]]),
        ([[0, 1], [0, 1]], [[0, 1], [0, 1]]),
        ([[0, 0, 1, 1]], [[0], [0]]),
        ([[0, 1], [2, 3]], [[0], [0], [1], [1]]),
        ([0, 1, 0, 1], [[0, 2], [1, 3]]),
    ],
)
def test_a_process_brings_what_its_devices_hold(holders, parts):
    for process, own in enumerate(parts):
        assert part_of(process, np.array(holders)) == (len(holders), own)


@pytest.mark.parametrize("holders", [[[0, 0], [0, 1], [1, 1]], [0, 0, 1]])
def test_parts_that_cannot_be_divided_are_refused(holders):
    with pytest.raises(ValueError, match="the 3 parts of a batch cannot be divided among the 2"):
        part_of(0, np.array(holders))


def test_a_process_without_a_device_of_the_mesh_is_refused():
    with pytest.raises(ValueError, match="the mesh has devices of the processes 0, 1, but none of"):
        part_of(2, np.array([[0, 0], [1, 1]]))
