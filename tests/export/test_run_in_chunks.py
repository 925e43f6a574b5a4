"""A graph run in chunks gives what the engine gives with the whole of it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from export.errors import ExportError
from export.graph.contract import INTERCHANGE_FILE, interchange_inputs
from export.graph.run_in_chunks import cut_graph, logits_in_chunks, run_in_chunks, weight_bytes
from gemma_keras import open_checkpoint
from tests.models import GENERATIONS, VOCABULARY_SIZE

IDS = np.random.default_rng(5).integers(0, VOCABULARY_SIZE, (3, 24)).astype(np.int32)
POSITIONS = np.array([0, 11, 23])


@pytest.fixture(params=GENERATIONS)
def generation(request):
    return request.param


@pytest.fixture
def config(tiny_bundles, generation):
    return open_checkpoint(tiny_bundles / f"tiny-{generation}").config


def graph_of(folder):
    return onnx.load(folder / INTERCHANGE_FILE, load_external_data=False).graph


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
@pytest.mark.parametrize("chunk_bytes", [1, 100_000, 1 << 40])
def test_pieces_of_any_size_give_the_engines_logits(
    tiny_bundles, generation, recipe, config, chunk_bytes
):
    folder = tiny_bundles / f"{generation}-{recipe}"
    told = []
    found = logits_in_chunks(
        folder, config, IDS, POSITIONS, lambda *at: told.append(at), chunk_bytes
    )
    engine = Engine(Bundle.open(folder))
    expected = []
    for row in IDS.tolist():
        engine.rewind(0)
        expected.append(np.concatenate(list(engine.all_logits(row)))[POSITIONS])
    expected = np.concatenate(expected)
    assert found.shape == (len(IDS) * len(POSITIONS), VOCABULARY_SIZE)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())
    assert told == [(n + 1, len(told)) for n in range(len(told))]
    assert (len(told) == 1) == (chunk_bytes > 1 << 30)


@pytest.mark.parametrize("most", [1, 30_000, 200_000])
def test_a_piece_has_no_more_weights_than_it_may(tiny_bundles, generation, most):
    graph = graph_of(tiny_bundles / f"{generation}-int8")
    weights = {tensor.name for tensor in graph.initializer}
    chunks = list(cut_graph(graph, ["logits"], most))
    for chunk in chunks:
        with_weights = [node for node in chunk.nodes if weights.intersection(node.input)]
        size = sum(weight_bytes(tensor) for tensor in chunk.weights)
        assert size <= most or len(with_weights) == 1
    assert sum(len(chunk.nodes) for chunk in chunks) == len(graph.node)


def test_only_what_the_output_needs_is_run(tiny_bundles, generation, config):
    folder = tiny_bundles / f"{generation}-fp32"
    (chunk,) = cut_graph(graph_of(folder), ["embedded.scaled"])
    assert [node.op_type for node in chunk.nodes if "padding" not in node.name] == ["Gather", "Mul"]
    inputs = interchange_inputs(config, IDS[:1])
    picks = {"embedded.scaled": lambda value: value}
    (found,) = run_in_chunks(folder / INTERCHANGE_FILE, [inputs], picks)
    table = open_checkpoint(folder.parent / f"tiny-{generation}").weights["token_embedding"]
    expected = table[IDS[:1]] * np.float32(config.embedding_scale)
    np.testing.assert_allclose(found["embedded.scaled"], expected, rtol=1e-6)


def test_what_is_picked_is_not_what_later_pieces_read(tiny_bundles, generation, config):
    """Of a value in the middle one number is kept, and the logits are as if it were whole."""
    path = tiny_bundles / f"{generation}-fp32" / INTERCHANGE_FILE
    inputs = [interchange_inputs(config, IDS[:1])]
    middle = "layers.1.pre_ffw_norm.out"
    picks = {"logits": lambda value: value}
    (alone,) = run_in_chunks(path, inputs, picks, chunk_bytes=1)
    picks[middle] = lambda value: value[0, 0, :1] * 0
    (found,) = run_in_chunks(path, inputs, picks, chunk_bytes=1)
    assert found[middle].shape == (1,)
    np.testing.assert_array_equal(found["logits"], alone["logits"])


def test_a_graph_that_does_not_run_is_told(tiny_bundles, config, generation):
    ids = np.full((1, 4), VOCABULARY_SIZE, np.int32)  # there is no such token
    with pytest.raises(ExportError, match="does not run"):
        logits_in_chunks(tiny_bundles / f"{generation}-fp32", config, ids, np.array([0]))
