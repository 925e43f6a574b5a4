"""Exports of embedders: their vectors are those of transformers, and wrong graphs are refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.embedder import Embedder
from edge_demo.text.embedding import EmbeddingTokens
from edge_demo.text.tokenizer import Tokenizer
from export import export_onnx
from export.embedder import opened_embedder, prepare_embedder, write_embedder
from export.errors import ExportError, ExportRequestError
from export.graph import embedder as graph
from export.options import ExportOptions
from gemma_keras.checkpoints.opening.sentence_transformers import is_embedder
from tests.gemma_keras.embedder_files import (
    DIM,
    HIDDEN,
    MAX_TOKENS,
    PROMPTS,
    WIDE,
    by_torch,
    write_tiny_embedder,
)
from tests.models import TEXT, relative_difference

TEXTS = TEXT.split("\n")
LEAST_COSINE = {"fp32": 1 - 1e-6, "fp16": 1 - 1e-5, "int8": 0.998, "int8-rows": 0.998, "int4": 0.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embedder")


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' model and the projections that are in the folder."""
    return write_tiny_embedder(folder)


@pytest.fixture(scope="module")
def fp32(folder, reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "fp32"
    result = export_onnx(folder, out, "fp32")
    assert result.quality.least_cosine > 1 - 1e-6 and result.quality.texts > 10
    return out


def encode(path, texts=TEXTS, prompt_name=None):
    bundle = Bundle.open(path)
    embedder = Embedder(bundle, threads=1)
    tokens = EmbeddingTokens(embedder.spec, Tokenizer(bundle), embedder.longest)
    return embedder.vectors(tokens.of_texts(texts, prompt_name))


def test_vectors_are_those_of_transformers(fp32, reference, record_property):
    found = encode(fp32)
    assert found.shape == (len(TEXTS), DIM) and found.dtype == np.float32
    difference = relative_difference(found, by_torch(reference, TEXTS))
    record_property("embedder as fp32, greatest difference / spread", f"{difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_travel_with_the_bundle(fp32, reference, name):
    expected = by_torch(reference, TEXTS[:2], prompt=PROMPTS[name])
    assert relative_difference(encode(fp32, TEXTS[:2], name), expected) < 1e-4


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int8-rows", "int4"])
def test_each_recipe_stays_near(folder, reference, tmp_path, recipe, record_property):
    target = {"target": "armv8.0"} if recipe == "int8-rows" else {}
    result = export_onnx(folder, tmp_path / "out", recipe, **target)
    cosines = (encode(tmp_path / "out") * by_torch(reference, TEXTS)).sum(axis=1)
    record_property(f"embedder as {recipe}, least cosine", f"{cosines.min():.5f}")
    assert cosines.min() > LEAST_COSINE[recipe]
    assert result.quality.least_cosine > LEAST_COSINE[recipe]
    written = json.loads((tmp_path / "out" / "bundle.json").read_text())
    assert written["quality"]["least_cosine"] == result.quality.least_cosine
    assert f"{result.quality.least_cosine:.6f}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_graph_of_tokens_gives_the_same_wherever_padding_is(fp32, side):
    bundle = Bundle.open(fp32)
    tokens = EmbeddingTokens(bundle.embedder, Tokenizer(bundle), MAX_TOKENS)
    rows = tokens.of_texts(TEXTS[:3])
    length = max(map(len, rows)) + 3
    ids, mask = np.zeros((2, 3, length), np.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    session = ort.InferenceSession(fp32 / "model.onnx")
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    assert relative_difference(found, encode(fp32, TEXTS[:3])) < 1e-4


def test_a_bundle_says_what_it_is(fp32):
    manifest = json.loads((fp32 / "bundle.json").read_text())
    assert (manifest["kind"], manifest["format_version"]) == ("embedder", 6)
    assert manifest["embedder"] == {
        "dimensions": DIM,
        "eos": 1,
        "pooling": "mean",
        "num_heads": 6,
        "projections": [[HIDDEN, WIDE], [WIDE, DIM]],
        "prompts": PROMPTS,
        "default_prompt_name": None,
    }
    assert manifest["model"]["context_length"] == MAX_TOKENS
    card = (fp32 / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card and "edge-demo embed" in card
    assert not (fp32 / "genai_config.json").exists()


def test_a_soft_cap_is_before_the_mask(folder, reference, tmp_path):
    """No published embedder has one; the verification compares with the Keras layers."""
    embedder = opened_embedder(folder)
    config = embedder.transformer.config
    layers = tuple(dataclasses.replace(s, attention_soft_cap=1.5) for s in config.layers)
    capped = dataclasses.replace(config, layers=layers)
    transformer = dataclasses.replace(embedder.transformer, config=capped)
    embedder = dataclasses.replace(embedder, transformer=transformer)
    job = prepare_embedder(embedder, "fp32", ExportOptions())
    _, quality, _ = write_embedder(job, tmp_path, tmp_path / "work", lambda stage, share: None)
    assert quality.least_cosine > 1 - 1e-6
    assert relative_difference(encode(tmp_path), by_torch(reference, TEXTS)) > 1e-2


@pytest.mark.parametrize("mistake", [{"_UNSEEN": 0.0}, {"_UNSEEN": -1.0}], ids=str)
def test_a_wrong_graph_is_not_written(folder, reference, tmp_path, monkeypatch, mistake):
    for name, value in mistake.items():
        monkeypatch.setattr(graph, name, value)
    with pytest.raises(ExportError, match="differs from the Keras model: a cosine of 0"):
        export_onnx(folder, tmp_path / "out", "fp32")
    assert list(tmp_path.iterdir()) == []
    export_onnx(folder, tmp_path / "out", "fp32", verify=False)  # who asks for no comparison


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": "."}, "base is for models that generate text"),
        ({"adapters": "beside"}, "adapters is for"),
        ({"instruction_tuned": True}, "instruction_tuned is for"),
        ({"recipe": "int4", "kl_budget": 0.1}, "kl_budget is for"),
        ({"lowering": "traced"}, "lowering is for"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype is for"),
        ({"report": __file__}, "report is for"),
        ({"recipe": "int4", "calibration": "self"}, "writes no text to calibrate on"),
        ({"recipe": "fp32", "calibration": "text"}, "float recipes are not calibrated"),
        ({"max_context": MAX_TOKENS + 1}, "3 to 120 tokens"),
        ({"max_context": 2}, "3 to 120 tokens"),
        ({"recipe": "int3"}, "no recipe 'int3'"),
        ({"plan": {"projections.9": {"bits": 32}}}, "projections.9"),
    ],
    ids=str,
)
def test_what_an_embedder_cannot_be_is_said(folder, reference, tmp_path, options, words):
    with pytest.raises(ExportRequestError, match=words):
        export_onnx(folder, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_shorter_longest_text_and_a_plan_count(folder, reference, tmp_path):
    plan = {"layers.0.mlp.up": {"bits": 32}}
    out = tmp_path / "out"
    export_onnx(folder, out, "int8", max_context=20, plan=plan, calibration="none", verify=False)
    bundle = Bundle.open(out)
    assert bundle.context_length == 20
    assert bundle.manifest["plan"]["layers.0.mlp.up"]["bits"] == 32
    assert bundle.manifest["plan"]["projections.1"]["bits"] == 8
    assert bundle.manifest["quality"] is None


def test_a_text_to_calibrate_on_is_used(folder, reference, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    result = export_onnx(folder, tmp_path / "out", "int4", calibration=text)
    assert result.rounding["text"] == "the text text.txt"
    assert result.quality.least_cosine > LEAST_COSINE["int4"]


def test_the_command_says_how_near_it_is(folder, reference, tmp_path):
    command = [sys.executable, "-m", "export.cli", str(folder), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--recipe", "fp32"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "cosine to the reference at least 1.000000" in done.stdout
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 2 and "already exists" in again.stderr


@pytest.mark.parametrize("source", ["sample", "/nonexistent", "a-name"])
def test_other_sources_are_no_embedders(source):
    assert not is_embedder(source)
    assert opened_embedder(source) is None
