"""Penalties and min-p against transformers' logits processors and llama.cpp's definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.candidates import Candidates
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.text.generator import Generator, candidates_suffice
from edge_demo.text.penalties import penalize
from edge_demo.text.sampling import Sampler
from edge_demo.text.speculate import PromptLookup
from edge_demo.text.tokenizer import Tokenizer

LOGITS = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
LOGITS[7] = 0
TEXT = [3, 7, 3, 11, 49, 3, 11, 0]


def llama_cpp(logits, text, repeat, presence, frequency):
    """`llama_sampler_penalties_apply`, a token at a time."""
    out = logits.astype(np.float64)
    for token in set(text):
        out[token] = out[token] * repeat if out[token] <= 0 else out[token] / repeat
        out[token] -= text.count(token) * frequency + presence
    return out


@pytest.mark.parametrize("repeat", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("presence, frequency", [(0.0, 0.0), (0.7, 0.0), (0.0, -0.4), (-2, 2)])
def test_penalties_are_llama_cpps(repeat, presence, frequency):
    expected = llama_cpp(LOGITS, TEXT, repeat, presence, frequency)
    found = penalize(LOGITS, None, TEXT, repeat, presence, frequency)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    # and of candidates, of which some are in the text
    ids = np.array([0, 3, 5, 11, 20])
    found = penalize(LOGITS[ids], ids, TEXT, repeat, presence, frequency)
    np.testing.assert_allclose(found, expected[ids], rtol=1e-6, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p", [(0.7, 20, 0.95, 0.02), (2, 0, 1, 0.2)]
)
def test_repetition_and_min_p_are_those_of_transformers(penalty, temperature, top_k, top_p, min_p):
    torch = pytest.importorskip("torch")  # no device has it
    peer = pytest.importorskip("transformers.generation")

    ids, scores = torch.tensor([TEXT]), torch.from_numpy(LOGITS.copy())[None]
    chain = [
        peer.RepetitionPenaltyLogitsProcessor(penalty),
        peer.TemperatureLogitsWarper(float(temperature)),
        *([peer.TopKLogitsWarper(top_k)] if top_k else []),
        *([peer.TopPLogitsWarper(top_p)] if top_p < 1 else []),
        peer.MinPLogitsWarper(min_p),
    ]
    for step in chain:
        scores = step(ids, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    found = np.zeros(50)
    sampler = Sampler(temperature, top_k, top_p, min_p=min_p)
    kept, probabilities = sampler.distribution(penalize(LOGITS, None, TEXT, penalty, 0, 0))
    found[kept] = probabilities
    assert 1 < len(kept) < 50
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("min_p, kept", [(0.0, 4), (0.24, 3), (0.26, 2), (0.51, 1), (1.0, 1)])
def test_min_p_keeps_what_is_so_likely_as_the_first(min_p, kept):
    logits = np.log(np.array([0.4, 0.1, 0.05, 0.2], np.float32))
    ids, probabilities = Sampler(1.0, min_p=min_p).distribution(logits)
    assert ids.tolist() == [0, 3, 1, 2][:kept]
    assert probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "last_n, penalized", [(0, []), (1, [0]), (3, [0, 3, 11]), (64, [*TEXT]), (-1, [*TEXT])]
)
def test_the_window_is_the_last_tokens(last_n, penalized):
    logits = np.zeros(50, np.float32)
    sampler = Sampler(presence_penalty=2, repeat_last_n=last_n)
    free = next(i for i in range(50) if i not in penalized)
    assert sampler.pick(logits, TEXT) == free
    np.testing.assert_array_equal(logits, 0)  # they are left as they were


def test_without_penalties_the_text_is_not_looked_at():
    assert Sampler().pick(LOGITS, None) == LOGITS.argmax()  # type: ignore[arg-type]


# --- how many candidates they need ---------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.floats(-9, 9, width=32), min_size=40, max_size=40, unique=True),
    text=st.lists(st.integers(0, 39), max_size=12),
    top_k=st.integers(0, 8),
    last_n=st.integers(-1, 9),
    repeat=st.sampled_from([1.0, 1.2, 5.0, 0.5]),
    presence=st.sampled_from([0.0, 1.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.5, -0.5]),
)
def test_within_reach_the_likeliest_are_enough(
    logits, text, top_k, last_n, repeat, presence, frequency
):
    """Any choice from the likeliest alone is that from all, if there are as many as `reach`."""

    def sampler():
        return Sampler(
            1.0 if top_k else 0.0, top_k, seed=5, repeat_penalty=repeat, repeat_last_n=last_n,
            presence_penalty=presence, frequency_penalty=frequency,
        )  # fmt: skip

    logits, reach = np.array(logits, np.float32), sampler().effective_top_k
    if not reach:
        assert last_n < 0 or min(repeat - 1, presence, frequency) < 0
        return
    best = np.argsort(-logits)[:reach]
    few = sampler().pick(Candidates(best, logits[best]), text)
    assert few == sampler().pick(logits, text)


@pytest.mark.parametrize("wanted", [{}, {"repeat_last_n": -1}, {"repeat_last_n": 256}])
def test_where_candidates_are_not_enough_all_logits_are_run(tiny_bundles, wanted):
    bundle = Bundle.open(tiny_bundles / "gemma3-fp32")
    sampler = Sampler(repeat_penalty=1.1, **wanted)
    assert candidates_suffice(bundle, sampler) == (not wanted)
    assert not candidates_suffice(bundle, Sampler(repeat_penalty=0.9))
    assert not candidates_suffice(bundle, Sampler(frequency_penalty=-0.1))
    assert candidates_suffice(bundle, Sampler(repeat_penalty=0.9, repeat_last_n=0))


# --- in answers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generators(tiny_bundles):
    bundle = Bundle.open(tiny_bundles / "gemma3-fp32")
    tokenizer = Tokenizer(bundle)
    return [Generator(kind(bundle, 1), tokenizer) for kind in (Engine, CandidateEngine)]


PROMPT = [2, 20, 30, 20, 30, 40]


def test_an_answer_is_that_of_a_loop_with_penalties(generators):
    everything, few = generators
    sampler = Sampler(repeat_penalty=1.3, frequency_penalty=0.3, repeat_last_n=20)
    found = everything.generate(PROMPT, sampler, 40).ids
    expected, engine = [], everything.engine
    for _ in range(40):
        engine.rewind(0)
        logits = engine.prefill(PROMPT + expected)
        last = (PROMPT + expected)[-20:]
        expected.append(int(llama_cpp(logits, last, 1.3, 0.0, 0.3).argmax()))
    assert found == expected
    assert few.generate(PROMPT, sampler, 40).ids == expected
    assert everything.generate(PROMPT, sampler, 40, PromptLookup()).ids == expected
    assert found != everything.generate(PROMPT, Sampler(), 40).ids


def test_tokens_that_end_an_answer_are_not_penalized(generators, monkeypatch):
    """Each turn of a conversation has one: later answers would not end."""
    generator, seen = generators[0], []

    class Watch(Sampler):
        def pick(self, logits, text=()):
            seen.append(list(text))
            return super().pick(logits, text)

    generator.generate([2, 20, 1, 30], Watch(presence_penalty=1), 3)
    assert seen[0] == [2, 20, 30] and len(seen[2]) == 5
