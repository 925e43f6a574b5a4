"""Products by rows: by the formula, and in models beside the Keras model of the same weights."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.manifest import GraphSpec, TensorSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import BundleError
from export import export_onnx
from export.errors import ExportRequestError
from export.formats.formats import Format
from export.formats.packing import stored_tensors
from export.formats.round_to_nearest import search_scales
from export.graph import by_rows
from export.graph.named_nodes import NamedNodes
from export.graph.run_in_chunks import logits_in_chunks
from export.graph.weights_file import WeightsFile
from gemma_keras import GemmaCausalLM, open_checkpoint
from tests.models import GENERATIONS, random_ids, write_tiny_hf

ROWS, INPUTS = 40, 96
SHAPE = ("batch", "length", INPUTS)
CONTRACT = GraphSpec(
    "engine.onnx",
    (TensorSpec("x", "float32", SHAPE),),
    (TensorSpec("y", "float32", ("batch", "length", ROWS)),),
)


# --- one product ---------------------------------------------------------------------------------


def multiply(folder, matrix, x, terms):
    """What onnxruntime makes of a product; and the numbers that are stored of the matrix."""
    fmt = Format(8, INPUTS, terms=terms)
    quantized = search_scales(matrix, fmt)
    with WeightsFile(folder / "model.onnx_data") as file:
        for part, array in stored_tensors(quantized, fmt).items():
            file.add(f"m.{part}", array)
    graph = NamedNodes(file, CONTRACT)
    found = by_rows.product(graph, "m", graph.inputs["x"], "y", fmt, (ROWS, INPUTS))
    ir.save(graph.model([found]), folder / "graph.onnx")
    session = ort.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0], quantized.values(fmt, INPUTS)


@pytest.mark.parametrize("terms", [1, 2])
def test_a_product_is_that_of_the_rounded_activations(terms, tmp_path):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    x = rng.normal(size=(2, 5, INPUTS)).astype(np.float32)
    x[0, 1] *= 1000  # a scale of its own
    x[1, 2] = 0
    x[1, 3, 7] = 50
    found, stored = multiply(tmp_path, matrix, x, terms)
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127), 1e-30)
    rounded = np.round(x / scale)
    if terms == 2:
        rounded = rounded + np.round((x / scale - rounded) * 254) / 254
    np.testing.assert_allclose(found, rounded * scale @ stored.T, rtol=1e-4, atol=1e-4)
    assert not found[1, 2].any()
    error = np.abs(found - x @ stored.T).max(axis=-1) / np.maximum(scale[..., 0], 1e-20)
    assert error.max() < (20 if terms == 1 else 0.1)


def test_what_a_token_is_run_with_does_not_change_it(tmp_path):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(ROWS, INPUTS)).astype(np.float32)
    x = rng.normal(size=(1, 9, INPUTS)).astype(np.float32)
    together, _ = multiply(tmp_path, matrix, x, 2)
    for i in range(9):
        alone, _ = multiply(tmp_path, matrix, x[:, i : i + 1], 2)
        np.testing.assert_array_equal(alone, together[:, i : i + 1])


# --- a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A generation's folder and its bundle, each made once."""
    made = {}

    def get(generation, tied=True):
        if (generation, tied) not in made:
            folder = tmp_path_factory.mktemp(generation)
            write_tiny_hf(folder / "model", generation, tied=tied)
            out = folder / "bundle"
            export_onnx(folder / "model", out, target="armv8.0", verify=False)
            made[generation, tied] = folder / "model", Bundle.open(out)
        return made[generation, tied]

    return get


@pytest.mark.keras
@pytest.mark.spread
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_engine_is_near_the_keras_model(generation, tied, exported, record_property):
    folder, bundle = exported(generation, tied)
    assert bundle.recipe == "int8-rows" and bundle.embedding.by_rows
    ids = random_ids()[:1]
    expected = GemmaCausalLM.from_preset(folder, dtype="float32").logits(ids)[0]
    found = np.concatenate(list(Engine(bundle, threads=1).all_logits(ids[0].tolist())))
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    record_property(f"{generation} by rows, rms difference / spread", f"{error:.2g}")
    assert 1e-4 < error < 0.12


@pytest.mark.keras
@pytest.mark.backends("torch")
def test_candidates_are_the_engines_and_tokens_alone_give_nearly_the_same(exported):
    """Attention adds up in another order, which rounds a few activations the other way; how many
    depends on the processor. It costs much less than rounding itself."""
    folder, bundle = exported("gemma3")
    ids = random_ids()[0].tolist()
    engine, candidates = Engine(bundle, threads=1), CandidateEngine(bundle, threads=1)
    logits, found = engine.prefill(ids), candidates.prefill(ids)
    np.testing.assert_array_equal(found.logits, logits[found.ids])
    assert found.ids[found.logits.argmax()] == logits.argmax()
    engine.rewind(0)
    for token in ids[:-1]:
        engine.decode(token)
    alone = engine.decode(ids[-1])
    exact = GemmaCausalLM.from_preset(folder, dtype="float32").logits(np.array([ids]))[0, -1]

    def distance(one, other):
        return np.sqrt(np.mean(np.square(one - other)))

    assert distance(alone, logits) < 0.3 * distance(logits, exact)
    assert distance(alone, exact) < 1.1 * distance(logits, exact)


@pytest.mark.keras
@pytest.mark.backends("torch")
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 40])
def test_the_graph_for_other_runtimes_says_the_same_whole_and_in_chunks(exported, chunk_bytes):
    folder, bundle = exported("gemma3")
    ids, positions = random_ids()[:1, :24], np.array([0, 11, 23])
    config = open_checkpoint(folder).config
    found = logits_in_chunks(bundle.path, config, ids, positions, chunk_bytes=chunk_bytes)
    engine = Engine(bundle, threads=1)
    expected = np.concatenate(list(engine.all_logits(ids[0].tolist())))[positions]
    assert np.abs(found - expected).max() < 0.03 * expected.std()


@pytest.mark.keras
@pytest.mark.backends("torch")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_are_the_models_divided_by_columns(tied, exported):
    folder, bundle = exported("gemma2", tied)
    table = EmbeddingTable(bundle.path / bundle.weights, bundle.embedding)
    model = GemmaCausalLM.from_preset(folder, dtype="float32")
    ids = [7, 3, 200, 3]
    expected = np.asarray(model.backbone.embed(np.array([ids])).detach())[0]
    np.testing.assert_allclose(table.rows(ids), expected, atol=np.abs(expected).max() / 100)
    np.testing.assert_array_equal(table.rows([3])[0], table.rows(ids)[1])


@pytest.mark.keras
@pytest.mark.backends("torch")
@pytest.mark.parametrize("change", [{"by_rows": 1}, {"block_size": 32}, {"bits": 4}])
def test_a_manifest_that_says_otherwise_is_refused(change, exported, tmp_path):
    _, bundle = exported("gemma")
    for file in bundle.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["embedding"] |= change
    (tmp_path / "bundle.json").unlink()
    (tmp_path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="embedding"):
        Bundle.open(tmp_path)


# --- what cannot be expressed --------------------------------------------------------------------


def test_standard_operators_do_not_express_it(tmp_path):
    write_tiny_hf(tmp_path / "model", "gemma")
    with pytest.raises(ExportRequestError, match="does not support token_embedding by rows"):
        export_onnx(tmp_path / "model", tmp_path / "out", "int8-rows", lowering="traced",
                    calibration="none", verify=False)  # fmt: skip
    assert not (tmp_path / "out").exists()
