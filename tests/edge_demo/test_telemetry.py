"""onnxruntime collects nothing: a home and a cache that are empty stay so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What onnxruntime takes for a sign that it is tested, and then collects nothing either way, would
# hide a fault: the environment is made of these alone.
KEPT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "KERAS_BACKEND", "OMP_NUM_THREADS")


def files_left(folder: Path, *command: str, text: str = "", **variables: str) -> list[str]:
    """Run a command with an empty home and an empty cache: the files that are there afterwards."""
    home, cache = folder / "home", folder / "home" / "cache"
    cache.mkdir(parents=True)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        input=text,
        capture_output=True,
        text=True,
        env=environment | variables,
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def collects(tmp_path_factory) -> None:
    """There is something to turn off: builds for some processors have no telemetry."""
    left = files_left(tmp_path_factory.mktemp("bare"), "-c", "import onnxruntime")
    if not left:
        pytest.skip("this build of onnxruntime collects nothing")
    assert any("onnxruntime" in name for name in left)


def commands(bundle: Path) -> dict[str, tuple[list[str], str]]:
    """Command line and stdin, by what is run."""
    run = ["-m", "edge_demo.cli.main"]
    few = ["--max-tokens", "2"]
    return {
        "generate": ([*run, "generate", str(bundle), "--prompt", "The", *few], ""),
        "chat": ([*run, "chat", str(bundle), *few], "Hello\n"),
        "library": (["-c", "from edge_demo import Engine"], ""),
    }


@pytest.mark.parametrize("what", ["generate", "chat", "library"])
def test_an_empty_home_stays_empty(collects, tiny_bundles, tmp_path, what):
    command, text = commands(tiny_bundles / "chat")[what]
    assert files_left(tmp_path, *command, text=text) == []


def test_whoever_wants_telemetry_sets_the_variable(collects, tiny_bundles, tmp_path):
    command, _ = commands(tiny_bundles / "chat")["generate"]
    left = files_left(tmp_path, *command, ORT_DISABLE_TELEMETRY="0")
    assert any("onnxruntime" in name for name in left)
