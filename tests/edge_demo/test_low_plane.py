"""Logits of candidates, of which the device adds what the low plane of the head says."""

from __future__ import annotations

import numpy as np
import pytest

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.reader import Bundle
from edge_demo.engine import low_plane
from edge_demo.engine.low_plane import LowPlane
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import BundleError
from tests.edge_demo.bundle_files import edit_manifest
from tests.models import GENERATIONS, VOCABULARY_SIZE

IDS = [2, 9, 30, 41, 17, 6, 250, 11]


def plane_of(bundle: Bundle) -> LowPlane:
    plane = LowPlane.of(bundle)
    assert plane is not None
    return plane


@pytest.mark.parametrize("generation", GENERATIONS)
def test_candidates_have_the_logits_of_the_graph_of_all(tiny_bundles, generation):
    bundle = Bundle.open(tiny_bundles / f"{generation}-int8")
    assert bundle.low_plane_apart
    engine, candidates = Engine(bundle, threads=1), CandidateEngine(bundle, threads=1)
    all_logits, found = engine.prefill(IDS), candidates.prefill(IDS)
    for token in (5, 77, 299):
        # The graph of all logits rounds what it multiplies with the low plane to 8 bits.
        own = all_logits[found.ids]
        assert 0 < np.abs(found.logits - own).max() < 0.02 * all_logits.std()
        assert found.ids[found.logits.argmax()] == all_logits.argmax()
        all_logits, found = engine.decode(token), candidates.decode(token)


@pytest.mark.parametrize("generation", ["gemma2", "gemma3"])
def test_what_is_added_is_the_product_with_the_low_plane(tiny_bundles, generation):
    bundle = Bundle.open(tiny_bundles / f"{generation}-int8")
    spec, cap = bundle.embedding, bundle.final_soft_cap
    assert (cap is not None) == (generation == "gemma2")
    rng = np.random.default_rng(0)
    ids = rng.choice(VOCABULARY_SIZE, 60, replace=False)
    high = rng.normal(size=60).astype(np.float32) * 9
    hidden = rng.normal(size=spec.width).astype(np.float32)
    numbers, scales = EmbeddingTable(bundle.path / bundle.weights, spec).low_plane(ids.tolist())
    assert len(np.unique(numbers)) > 10 and numbers.min() < 0 < numbers.max()
    rows = numbers.reshape(60, spec.blocks, -1) * scales.astype(np.float64)[..., None]
    expected = high + rows.reshape(60, -1)[:, : spec.width] @ hidden
    if cap is not None:
        expected = np.tanh(expected / cap) * cap
    found = plane_of(bundle).logits(ids, high, hidden)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - high).max() > 0.01


def test_a_row_gives_the_same_bits_whatever_was_kept_before(tiny_bundles, monkeypatch):
    monkeypatch.setattr(low_plane, "_FEWEST", 40)
    monkeypatch.setattr(low_plane, "KEPT_BYTES", 0)
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    plane, fresh = plane_of(bundle), plane_of(bundle)
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=bundle.embedding.width).astype(np.float32)
    zeros = np.zeros(40, np.float32)
    first = rng.choice(VOCABULARY_SIZE, 40, replace=False)
    expected = fresh.logits(first, zeros, hidden)
    for same in (40, 0, 12, 39, 1, 40, 25):  # kept, forgotten, and both in one call
        others = rng.choice(np.setdiff1d(np.arange(VOCABULARY_SIZE), first), 40, replace=False)
        ids = np.concatenate([first[:same], others[same:]])
        np.testing.assert_array_equal(plane.logits(ids, zeros, hidden)[:same], expected[:same])


@pytest.mark.parametrize("bad", [-1, VOCABULARY_SIZE, 1 << 40])
def test_a_graph_that_returns_other_tokens_is_refused(tiny_bundles, bad):
    bundle = Bundle.open(tiny_bundles / "gemma-int8")
    hidden = np.ones(bundle.embedding.width, np.float32)
    with pytest.raises(BundleError, match="outside the vocabulary"):
        plane_of(bundle).logits(np.array([4, bad]), np.zeros(2, np.float32), hidden)


def test_a_table_in_one_plane_has_no_low_one(damaged, tiny_bundles):
    assert LowPlane.of(Bundle.open(damaged)) is None
    graphs = Bundle.open(tiny_bundles / "gemma3-int8").manifest["graphs"]
    edit_manifest(damaged, lambda m: m["graphs"].update(candidates=graphs["candidates"]))
    with pytest.raises(BundleError, match="one plane"):
        Bundle.open(damaged)


@pytest.mark.parametrize("cap", [0, -1.0, "30", float("inf"), [30.0]])
def test_a_soft_cap_that_is_none_is_refused(damaged_int8, cap):
    edit_manifest(damaged_int8, lambda m: m["model"]["config"].update(final_soft_cap=cap))
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(damaged_int8)
