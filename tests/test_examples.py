"""The scripts of `examples/` run as users run them, on small models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_demo.bundle.reader import Bundle
from tests.edge_demo.conftest import tiny_bundles  # noqa: F401 - a fixture
from tests.gemma_keras.embedder_files import write_tiny_embedder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """Run an example that must succeed, in a new folder: what it printed."""

    def run(name: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "KERAS_BACKEND": "jax",  # compiles these small models soonest
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_a_notebook_tunes_with_lora_and_exports_a_bundle(run, tiny_bundles, tmp_path):  # noqa: F811
    out = run("notebook_lora.py", tiny_bundles / "tiny-gemma", "tuned")
    assert "before: Q: What do ducks lay? A:" in out and "after: Q: What do ducks lay? A:" in out
    bundle = Bundle.open(tmp_path / "tuned")
    assert bundle.recipe == "int8" and bundle.manifest["quality"]["same_top_token"] > 0.8


def test_a_model_is_exported_and_answers(run, tiny_bundles, tmp_path):  # noqa: F811
    out = run("export_and_chat.py", tiny_bundles / "tiny-chat", "chat", "Is the shop still open?")
    first, answer = out.split("\n", 1)
    assert first.startswith("wrote") and answer.strip()
    assert Bundle.open(tmp_path / "chat").tokenizer.chat is not None


def test_texts_are_listed_by_their_nearness_to_a_question(run, tmp_path):
    write_tiny_embedder(tmp_path / "embedder")
    texts = ("The old bridge was built of oak.", "Seven small stones lay on the table.")
    out = run("embed_texts.py", "embedder", "The old bridge was built of oak.", *texts)
    lines = [line.split("  ", 1) for line in out.splitlines()]
    assert sorted(text for _, text in lines) == sorted(texts)
    assert float(lines[0][0]) > float(lines[1][0]) and abs(float(lines[0][0])) <= 1
