"""A model that looks both ways generates nothing: nothing it keeps of a text stays as it is.

An embedder is exported as one: see test_embedder.py.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from export import export_onnx
from export.bundle.draft import LOWERINGS
from export.formats.recipes import plan_for_recipe
from export.graph.contract import interchange_contract
from export.graph.store_weights import store_weights
from export.graph.weights_file import WeightsFile
from gemma_keras.errors import ConfigError
from gemma_keras.open import open_checkpoint
from tests.gemma_keras.embedder_files import write_tiny_embedder

each_lowering = pytest.mark.parametrize("lowering", LOWERINGS)
WORDS = "needs a model that predicts the next token, but this model has bidirectional attention"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    write_tiny_embedder(folder)
    (folder / "modules.json").unlink()  # of sentence-transformers, which makes it an embedder
    return folder


@each_lowering
def test_an_export_is_refused_before_it_begins(embedder, tmp_path, lowering):
    with pytest.raises(ConfigError, match=f"an ONNX bundle {WORDS}"):
        export_onnx(embedder, tmp_path / "out", "fp32", lowering=lowering, verify=False)
    assert list(tmp_path.iterdir()) == []


@each_lowering
def test_each_lowering_refuses_what_it_cannot_express(embedder, tmp_path, lowering):
    """The same weights under a causal configuration are what it builds."""
    checkpoint = open_checkpoint(embedder)
    config = checkpoint.config
    plan = plan_for_recipe("fp32", config)
    with WeightsFile(tmp_path / "weights") as file:
        store_weights(config, checkpoint.weights, plan, file, lambda done, total: None)
    build = LOWERINGS[lowering]
    with pytest.raises(ConfigError, match=WORDS):
        build(config, plan, file, interchange_contract(config), 64)
    layers = tuple(dataclasses.replace(layer, bidirectional=False) for layer in config.layers)
    causal = dataclasses.replace(config, layers=layers)
    assert len(build(causal, plan, file, interchange_contract(causal), 64).graph) > 10


def test_the_command_says_it_in_a_sentence(embedder, tmp_path):
    command = [sys.executable, "-m", "export.cli", str(embedder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    *progress, line = done.stderr.splitlines()
    assert all(told.endswith("…") for told in progress)
    assert line.startswith(f"export-onnx: an ONNX bundle {WORDS}")
    assert list(tmp_path.iterdir()) == []
