"""`GemmaTextEmbedder.export`: the bundle gives the vectors of `encode`, whatever the model was."""

from __future__ import annotations

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.embedder import Embedder
from edge_demo.text.embedding import EmbeddingTokens, cut
from edge_demo.text.tokenizer import Tokenizer
from export import export_onnx
from export.errors import ExportRequestError
from gemma_keras import GemmaTextEmbedder
from tests.gemma_keras.embedder_files import write_tiny_embedder
from tests.models import TEXT

pytestmark = pytest.mark.keras

TEXTS = TEXT.split("\n")[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    write_tiny_embedder(folder)
    return folder


def on_the_device(path, texts, prompt_name=None, dimensions=None):
    bundle = Bundle.open(path)
    embedder = Embedder(bundle, threads=1)
    tokens = EmbeddingTokens(embedder.spec, Tokenizer(bundle), embedder.longest)
    return cut(embedder.vectors(tokens.of_texts(texts, prompt_name)), dimensions)


def test_a_live_model_is_exported(folder, tmp_path):
    model = GemmaTextEmbedder.from_preset(folder, dtype="float32", sequence_length=100)
    result = model.export(tmp_path / "out", format="onnx", recipe="fp32")
    assert result.quality.least_cosine > 1 - 1e-6
    assert Bundle.open(tmp_path / "out").context_length == 100
    for options in ({}, {"prompt_name": "query"}, {"truncate_dim": 16}):
        found = on_the_device(
            tmp_path / "out", TEXTS, options.get("prompt_name"), options.get("truncate_dim")
        )
        np.testing.assert_allclose(found, model.encode(TEXTS, **options), atol=2e-5)


@pytest.mark.backends("torch")
def test_a_preset_is_exported(folder, tmp_path):
    model = GemmaTextEmbedder.from_preset(folder, dtype="float32")
    model.save_to_preset(str(tmp_path / "preset"))
    export_onnx(tmp_path / "preset", tmp_path / "out", "fp32")
    found = on_the_device(tmp_path / "out", TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=2e-5)


@pytest.mark.backends("torch")
def test_lora_is_merged(folder, tmp_path):
    model = GemmaTextEmbedder.from_preset(folder, dtype="float32")
    before = model.encode(TEXTS)
    model.backbone.enable_lora(2)
    for variable in model.backbone.trainable_variables:
        variable.assign(variable + 0.05)
    after = model.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-2
    model.export(tmp_path / "out", format="onnx", recipe="fp32")
    np.testing.assert_allclose(on_the_device(tmp_path / "out", TEXTS), after, atol=1e-4)


@pytest.mark.backends("torch")
def test_a_quantized_model_is_exported(folder, tmp_path):
    model = GemmaTextEmbedder.from_preset(folder, dtype="float32")
    with pytest.warns(UserWarning, match="the token embedding is not quantized"):
        model.quantize("int8")
    model.export(tmp_path / "out", format="onnx", recipe="fp32")
    cosines = (on_the_device(tmp_path / "out", TEXTS) * model.encode(TEXTS)).sum(axis=1)
    assert cosines.min() > 0.999  # Keras rounds activations too


@pytest.mark.backends("torch")
def test_what_cannot_be_exported_is_said(folder, tmp_path):
    model = GemmaTextEmbedder.from_preset(folder, dtype="float32")
    bare = GemmaTextEmbedder(model.backbone, projection_dims=())
    with pytest.raises(ValueError, match="as_checkpoint needs a preprocessor"):
        bare.as_checkpoint()
    with pytest.raises(ExportRequestError, match="needs a preprocessor"):
        bare.export(tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="format"):
        model.export(tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []
