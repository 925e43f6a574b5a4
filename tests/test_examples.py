"""The scripts of `examples/` do what they say, on small models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_demo.bundle.reader import Bundle
from gemma_keras.checkpoints.adapters.find import find_adapter
from tests.gemma_keras.embedder_files import write_tiny_embedder
from tests.models import GEMMA_JINJA, chat_tokenizer_model

ROOT = Path(__file__).parents[1]
TEXTS = ("Seven small stones lay on the table.", "The old bridge was built of oak.")
# What each is run with: models that `folder` makes, and folders to write.
RUNS = {
    "notebook_lora.py": ["base", "tuned"],
    "export_and_chat.py": ["chat", "chat-bundle", "Is the shop still open?"],
    "embed_texts.py": ["embedder", TEXTS[1], *TEXTS],
    "teach_turns.py": [
        "chat",
        "rows.jsonl",
        "taught",
        "--sequence-length=112",
        "--answers=2",
        "--epochs=60",
        "--learning-rate=2e-2",
    ],
}
# All of them in one process, so that Keras starts once: what each prints goes to a file.
RUN_ALL = """
import json, os, runpy, sys
folder, runs = sys.argv[1], json.loads(sys.argv[2])
for script, arguments in runs.items():
    os.dup2(os.open(script + ".out", os.O_WRONLY | os.O_CREAT), 1)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(os.path.join(folder, script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{script} ended with {end.code}"
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def folder(tiny_bundles, tmp_path_factory):
    """Where all examples have been run."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(tiny_bundles / "tiny-gemma", folder / "base")
    shutil.copytree(folder / "base", folder / "chat")
    (folder / "chat" / "tokenizer.model").write_bytes(chat_tokenizer_model())
    (folder / "chat" / "chat_template.jinja").write_text(GEMMA_JINJA)
    write_tiny_embedder(folder / "embedder")
    rows = [{"prompt": "Is the shop open?", "response": "Yes."}] * 12
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(ROOT / "examples"), json.dumps(RUNS)],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "KERAS_BACKEND": "jax",  # compiles these small models soonest
        },
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_example_is_run():
    # by tests/edge_demo/server/test_clients.py, and by tests/edge_demo/make_guard.py
    elsewhere = {"call_functions.py", "tune_guard.py"}
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(RUNS) | elsewhere == scripts


def test_a_notebook_tunes_with_lora_and_exports_a_bundle(folder):
    out = (folder / "notebook_lora.py.out").read_text()
    assert "before: Q: What do ducks lay? A:" in out and "after: Q: What do ducks lay? A:" in out
    bundle = Bundle.open(folder / "tuned")
    assert bundle.recipe == "int8" and bundle.manifest["quality"]["same_top_token"] > 0.8


def test_a_model_is_taught_to_answer_in_turns(folder):
    lines = (folder / "teach_turns.py.out").read_text().splitlines()
    figures = [line for line in lines if line.startswith(("before:", "after:"))]
    before, after = (float(re.search(r"'loss': ([\d.]+)", line)[1]) for line in figures)
    assert after < 0.3 * before and "2 of 2 short answers are right, 2 end in time" in figures[1]
    assert find_adapter(folder / "taught") is not None and lines[-1].startswith("Hello! Who")


def test_a_model_is_exported_and_answers(folder):
    first, answer = (folder / "export_and_chat.py.out").read_text().split("\n", 1)
    assert first.startswith("wrote") and answer.strip()
    assert Bundle.open(folder / "chat-bundle").tokenizer.chat is not None


def test_texts_are_listed_by_their_nearness_to_a_question(folder):
    out = (folder / "embed_texts.py.out").read_text()
    lines = [line.split("  ", 1) for line in out.splitlines()]
    assert sorted(text for _, text in lines) == sorted(TEXTS)
    assert float(lines[0][0]) > float(lines[1][0]) and abs(float(lines[0][0])) <= 1
