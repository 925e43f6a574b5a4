"""Keys and values kept as 8-bit integers, against the floats that the plain graph returns."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.conftest import short_boundaries
from tests.models import GENERATIONS, TEXT, VOCABULARY_SIZE

STEP, SLACK, PREFILL_CHUNK = 16, 5, 8


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    with short_boundaries(STEP, SLACK, PREFILL_CHUNK):
        yield


@pytest.fixture(scope="module", params=GENERATIONS)
def bundle(request, tiny_bundles):
    return Bundle.open(tiny_bundles / f"{request.param}-int8-cache")


@pytest.fixture(scope="module")
def engine(bundle):
    return Engine(bundle, threads=1)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


def int8_inputs(bundle):
    return [s for s in bundle.engine.inputs if s.dtype == "int8"]


def test_layers_that_keep_the_whole_text_keep_integers(bundle):
    pasts = [s for s in bundle.engine.inputs if s.name.startswith("past_key_values.")]
    assert int8_inputs(bundle) == [s for s in pasts if s.shape[2] == "capacity"]
    assert int8_inputs(bundle)
    expected = {s.name: "int8" if s.shape[2] == "capacity" else "float32" for s in pasts}
    assert {s.name: s.dtype for s in bundle.candidates.inputs if s.name in expected} == expected


def test_the_first_layers_integers_are_the_plain_graphs_floats(bundle, engine):
    """What stands before the first such layer is exact, so it can be compared to the last step."""
    ids = text(40)
    engine.rewind(0)
    engine.prefill(ids)
    session = ort.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    feed |= {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, 40), np.int64)}
    graph = onnx.load(bundle.path / "engine.onnx", load_external_data=False).graph
    constants = {
        t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if not t.external_data
    }
    for spec in int8_inputs(bundle)[:2]:
        name = spec.name.replace("past_key_values", "present")
        (floats,) = session.run([name], feed)
        scale = constants[f"{name}.scale"]
        levels = engine._cache.buffers[spec.name][:, :, :40]
        expected = np.clip(floats / scale, -128, 127)
        assert np.abs(levels - expected).max() < 0.51
        assert 40 < np.abs(levels).max() <= 127  # the scales fit what comes


STEPS = st.one_of(
    st.tuples(st.just("prefill"), st.integers(1, 20)),
    st.tuples(st.just("decode"), st.integers(1, 4)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.lists(STEPS, min_size=2, max_size=9), seed=st.integers(0, 1000))
def test_any_course_gives_the_logits_of_single_steps(engine, steps, seed):
    engine.rewind(0)
    tokens, last = [], None
    for number, (step, amount) in enumerate(steps):
        if step == "rewind":
            tokens = tokens[: round(amount * len(tokens))]
            engine.rewind(len(tokens))
            continue
        new = text(min(amount, 100 - len(tokens)), [seed, number])
        if not new:
            continue
        rows = [engine.prefill(new)] if step == "prefill" else [engine.decode(t) for t in new]
        tokens += new
        last = tokens.copy(), rows[-1].copy()
    if last is None:
        return
    tokens, found = last
    engine.rewind(0)
    for token in tokens:
        expected = engine.decode(token)
    # Sums of another order can round a key the other way.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * expected.std())


def test_little_is_lost(bundle, engine):
    exact = Engine(Bundle.open(bundle.path.parent / bundle.path.name.replace("int8-cache", "fp32")))
    ids = Tokenizer(bundle).encode(TEXT)[:100]  # what the scales are for; not any token
    for each in (engine, exact):
        each.rewind(0)
    found, expected = (np.concatenate(list(e.all_logits(ids))) for e in (engine, exact))
    assert 0 < np.abs(found - expected).mean() < 0.02 * expected.std()


def test_both_graphs_agree(bundle, engine):
    ids = text(30)
    engine.rewind(0)
    candidates = CandidateEngine(bundle, threads=1).prefill(ids)
    expected = engine.prefill(ids)[candidates.ids]
    np.testing.assert_allclose(candidates.logits, expected, rtol=0, atol=1e-4)
