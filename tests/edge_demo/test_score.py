"""Perplexity against a slow computation from all logits, in float64."""

from __future__ import annotations

import math
import re

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine import runner as engine_module
from edge_demo.engine.runner import Engine
from edge_demo.errors import RequestError
from edge_demo.evaluate.perplexity import score, token_log_probabilities, windows
from tests.models import VOCABULARY_SIZE

BOS = 2


@pytest.fixture(scope="module")
def engine(tiny_bundles):
    return Engine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)


@pytest.fixture(scope="module")
def log_probabilities(tiny_bundles):
    """Of every token after every prefix of some ids, by the interchange graph: `(length, 300)`."""
    path = tiny_bundles / "gemma3-fp32" / "model.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }

    def run(ids):
        ids = np.array([ids], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
        logits = session.run(["logits"], feed)[0][0].astype(np.float64)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    return run


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


CUTS = st.integers(2, 20).flatmap(
    lambda length: st.tuples(st.integers(0, 60), st.just(length), st.integers(1, length - 1))
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(CUTS)
def test_every_token_is_predicted_once_with_as_much_context_as_the_stride_leaves(cut):
    num_tokens, length, stride = cut
    predicted = []
    for number, (first, end, count) in enumerate(windows(num_tokens, length, stride)):
        assert first == number * stride
        assert 1 <= count <= end - first <= length - 1
        assert end == min(first + length - 1, num_tokens)
        context = end - first - count
        assert context == (0 if number == 0 else length - 1 - stride)
        predicted += range(end - count, end)
    assert predicted == list(range(num_tokens))


@pytest.mark.parametrize("length, stride", [(1, 1), (0, 1), (5, 0), (5, 5), (5, -1), (2, 2)])
def test_windows_that_cannot_be_cut_are_refused_with_both_numbers(length, stride):
    with pytest.raises(RequestError, match=f"found {length} and {stride}"):
        list(windows(10, length, stride))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(CUTS.filter(lambda cut: cut[0] > 0), st.integers(1, 9), st.integers(0, 100))
def test_score_is_that_of_the_slow_computation(engine, log_probabilities, cut, chunk, seed):
    num_tokens, length, stride = cut
    ids = text(num_tokens, seed)
    # For each token the first window, in order, that holds it.
    starts = [
        next(s for s in range(0, num_tokens, stride) if s + length - 1 > i)
        for i in range(num_tokens)
    ]
    rows = {s: log_probabilities([BOS, *ids[s : s + length - 1]]) for s in set(starts)}
    losses = [-rows[s][i - s, ids[i]] for i, s in enumerate(starts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_SCORE_CHUNK", chunk)
        found = score(engine, BOS, ids, length, stride)
    assert (found.tokens, found.windows) == (num_tokens, len(rows))
    assert found.nll == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_only_the_first_windows_count_when_asked(engine):
    told = []
    part = score(engine, BOS, text(60), 11, 5, 3, lambda done, total: told.append((done, total)))
    assert (part.tokens, part.windows) == (20, 3)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert part.nll == pytest.approx(score(engine, BOS, text(60)[:20], 11, 5).nll, abs=1e-6)


def test_an_engine_that_holds_tokens_scores_the_same(engine):
    expected = score(engine, BOS, text(30), 20, 10)
    engine.rewind(0)
    engine.prefill(text(50, 1))
    assert score(engine, BOS, text(30), 20, 10) == expected


@pytest.mark.parametrize(
    "ids, length, stride, message",
    [
        ([], 10, 5, "empty"),
        ([5], 129, 64, "129 tokens does not fit the context of 128; give --length 2 to 128"),
        ([5], 1, 1, "at least 2"),
        ([5], 10, 10, "stride must be 1 to 9"),
        ([5, VOCABULARY_SIZE, 5], 10, 5, "outside the vocabulary"),
    ],
)
def test_what_cannot_be_scored_is_refused(engine, ids, length, stride, message):
    with pytest.raises(RequestError, match=message):
        score(engine, BOS, ids, length, stride)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 5),
    st.integers(1, 50),
    st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    st.integers(0, 99),
)
def test_log_probabilities_are_those_of_float64(rows, size, spread, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(rows, size)) * spread).astype(np.float32)
    targets = rng.integers(0, size, rows).tolist()
    exact = logits.astype(np.float64)
    exact -= np.logaddexp.reduce(exact, axis=1, keepdims=True)
    found = token_log_probabilities(logits, targets)
    assert found.dtype == np.float64 and found.shape == (rows,)
    np.testing.assert_allclose(found, exact[np.arange(rows), targets], rtol=1e-6, atol=1e-6)


@pytest.mark.sample
def test_the_real_model_finds_english_likely_and_its_reverse_not(sample_generator):
    words = re.findall(r"\S+", "It was a bright cold day in April, and the clocks struck thirteen.")
    tokenizer, engine = sample_generator.tokenizer, sample_generator.engine
    forward, backward = (
        score(engine, tokenizer.spec.bos, tokenizer.encode(" ".join(order), bos=False), 64, 32)
        for order in (words, words[::-1])
    )
    assert 1 < forward.perplexity < 50 < 200 < backward.perplexity
