"""Guessed tokens: the text stays that of plain decoding, and the engine holds what it would."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine import cache_size
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import RequestError
from edge_demo.text.generator import Generator
from edge_demo.text.sampling import Sampler
from edge_demo.text.speculate import DraftModel, PromptLookup, Speculator, check_draft
from edge_demo.text.tokenizer import Tokenizer
from tests.models import GENERATIONS, WINDOW

BOS = 2
SLACK = 3


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    """Windows and buffers whose ends a text of a few tokens crosses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_size, "STEP", 8)
        patch.setattr(cache_size, "SLACK", SLACK)
        yield


@pytest.fixture(scope="module", params=GENERATIONS)
def generators(request, tiny_bundles):
    """Two of them, one for plain decoding, over graphs of all logits and of candidates."""
    bundle = Bundle.open(tiny_bundles / f"{request.param}-fp32")
    tokenizer = Tokenizer(bundle)
    return {
        kind: [Generator(kind(bundle, threads=1), tokenizer) for _ in range(2)]
        for kind in (Engine, CandidateEngine)
    }


class Oracle:
    """Guesses a known text, with a wrong token wherever it is told."""

    def __init__(self, text, wrong=()):
        self.text, self.wrong = list(text), set(wrong)
        self.drafted = 0

    def draft(self, tokens, most):
        here = len(tokens)
        guess = self.text[here : here + most]
        self.drafted += len(guess)
        return [4 if here + i in self.wrong else token for i, token in enumerate(guess)]


def text(length, seed=0):
    return [BOS, *np.random.default_rng(seed).integers(4, 290, length - 1).tolist()]


@pytest.mark.parametrize("kind", [Engine, CandidateEngine])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 30),
    count=st.integers(1, 40),
    wrong=st.sets(st.integers(1, 70), max_size=12),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_any_guesses_leave_the_text_and_the_engine_as_plain_decoding(
    generators, kind, length, count, wrong, temperature
):
    plain, guessing = generators[kind]
    for one in (plain, guessing):
        one.engine.rewind(0)

    def sampler():
        return Sampler(temperature, top_k=40, seed=length)

    expected = plain.generate(text(length), sampler(), count)
    oracle = Oracle(text(length) + expected.ids, wrong)
    found = guessing.generate(text(length), sampler(), count, oracle)
    assert found.ids == expected.ids and found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert guessing.engine.tokens == plain.engine.tokens
    # and what it holds is right: the next logits are those of a plain engine
    more = text(5, seed=1)
    for engine in (plain.engine, guessing.engine):
        engine.rewind(min(len(engine.tokens), 100))
    logits = [one.engine.prefill(more) for one in (plain, guessing)]
    if kind is Engine:
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
    else:
        np.testing.assert_array_equal(*(np.sort(found.ids) for found in logits))


@pytest.mark.parametrize("kind", [Engine, CandidateEngine])
def test_an_answer_that_is_given_up_leaves_no_guesses(generators, kind):
    plain, guessing = generators[kind]
    for one in (plain, guessing):
        one.engine.rewind(0)
    expected = plain.generate(text(6), Sampler(), 30)
    oracle = Oracle(text(6) + expected.ids)
    pieces = guessing.stream(text(6), Sampler(), 30, oracle)
    for _ in range(9):
        next(pieces)
    pieces.close()
    assert oracle.drafted > 0
    assert guessing.engine.tokens == (text(6) + expected.ids)[: len(guessing.engine.tokens)]
    assert len(guessing.engine.tokens) == 6 + 9 - 1


@pytest.mark.parametrize("total", range(1, 3 * (WINDOW + SLACK)))
def test_what_is_retractable_can_be_taken_back_without_running_it_again(generators, total):
    engine = generators[Engine][0].engine
    engine.rewind(0)
    engine.prefill(text(total))
    room = engine.retractable(8)
    assert 0 <= room <= 8
    if room:
        engine.extend(text(1 + room, seed=2))
        assert engine.reusable(total + 1) == total + 1
        engine.rewind(total + 1)


# --- a smaller model guesses ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft_models(tiny_bundles):
    """One that often guesses right, and one that never does and forgets sooner."""
    near = Bundle.open(tiny_bundles / "gemma3-int8")
    far = Bundle.open(tiny_bundles / "short")
    return {
        "near": DraftModel(CandidateEngine(near, threads=1)),
        "far": DraftModel(Engine(far, threads=1)),
    }


@pytest.mark.parametrize("kind", [Engine, CandidateEngine])
@pytest.mark.parametrize("which", ["near", "far"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(length=st.integers(1, 40), count=st.integers(2, 60), seed=st.integers(0, 5))
def test_a_draft_model_changes_nothing_but_time(
    generators, draft_models, kind, which, length, count, seed
):
    plain, guessing = generators[kind]
    sampler = {"temperature": 0.5 * (seed % 2), "top_k": 40, "seed": seed}
    plain.engine.rewind(0)
    expected = plain.generate(text(length, seed), Sampler(**sampler), count)
    guessing.engine.rewind(0)
    found = guessing.generate(text(length, seed), Sampler(**sampler), count, draft_models[which])
    assert found.ids == expected.ids


def test_a_draft_model_guesses_its_own_greedy_text(tiny_bundles, draft_models):
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    generator = Generator(CandidateEngine(bundle, threads=1), Tokenizer(bundle))
    prompt = text(20)
    said = generator.generate(prompt, Sampler(), 12).ids
    model = draft_models["near"]
    assert model.draft(prompt, 5) == said[:5]
    assert model.draft(prompt + said[:3], 4) == said[3:7]  # its guesses held
    assert model.draft([*prompt, *said[:4], 17], 3) != said[5:8]  # they did not
    assert model.draft(prompt + said[:8], 4) == said[8:12]
    assert draft_models["far"].draft(text(16), 4) == []  # its context is full


def test_a_draft_with_another_tokenizer_is_refused(tiny_bundles):
    bundle = Bundle.open(tiny_bundles / "gemma3-int8")
    check_draft(bundle, Bundle.open(tiny_bundles / "gemma-fp32"))
    with pytest.raises(RequestError, match="has a different tokenizer from"):
        check_draft(bundle, Bundle.open(tiny_bundles / "chat"))


# --- what is sampled ------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", ["likeliest", "unlikely", "none"])
def test_two_sampled_tokens_have_the_models_probabilities(generators, guess):
    """Chi-square of 1,500 pairs against the exact probabilities of the 16 there can be."""
    generator = generators[Engine][0]
    engine, prompt, count, top_k = generator.engine, text(9), 1500, 4

    def distribution(tokens):
        engine.rewind(0)
        ids, probabilities = Sampler(8.0, top_k).distribution(engine.prefill(tokens))
        return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))

    expected = {
        (first, second): p * q
        for first, p in distribution(prompt).items()
        for second, q in distribution([*prompt, first]).items()
    }
    rank = {"likeliest": 0, "unlikely": -1}.get(guess)
    after = {f: list(distribution([*prompt, f])) for f in distribution(prompt)}

    class Guess:
        def draft(self, tokens, most):
            return [] if rank is None else [after[tokens[-1]][rank]]

    sampler, found = Sampler(8.0, top_k, seed=0), dict.fromkeys(expected, 0)
    for _ in range(count):
        engine.rewind(len(prompt) - 1)
        logits = engine.prefill(prompt[-1:])
        ahead = Speculator(engine, Guess(), prompt)
        ahead._plain_s = 1.0  # so that it guesses from the first token on
        first = sampler.pick(logits)
        second = sampler.pick(ahead.decode(first))
        ahead.settle()
        found[first, second] += 1
    statistic = sum((found[c] - count * p) ** 2 / (count * p) for c, p in expected.items())
    assert min(expected.values()) * count > 5  # so that the statistic has its distribution
    assert statistic < scipy.stats.chi2.ppf(0.999, len(expected) - 1)


# --- prompt lookup --------------------------------------------------------------------------------


def test_lookup_continues_as_the_text_went_on_the_last_time():
    lookup = PromptLookup()
    tokens = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 2, 3]
    assert lookup.draft(tokens, 3) == [7, 8, 2]  # the later one of two
    assert lookup.draft([1, 2, 3, 4], 4) == []  # another text
    assert lookup.draft([1, 2], 4) == []
    assert lookup.draft([], 4) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_lookup_finds_what_a_search_finds(tokens, most, split):
    lookup = PromptLookup()
    lookup.draft(tokens[:split], most)  # growing or at once, it is the same
    expected = []
    for n in (4, 3, 2):
        places = [
            end
            for end in range(n, len(tokens))
            if len(tokens) >= n and tokens[end - n : end] == tokens[len(tokens) - n :]
        ]
        if places:
            expected = tokens[places[-1] : places[-1] + most]
            break
    assert lookup.draft(tokens, most) == expected


def test_guesses_that_never_hold_are_made_less_and_less(generators):
    generator = generators[Engine][0]
    generator.engine.rewind(0)
    generator.engine.prefill(text(4))

    class Wrong:
        calls = 0

        def draft(self, tokens, most):
            self.calls += 1
            return [5] * most

    wrong, tokens = Wrong(), text(4)
    ahead = Speculator(generator.engine, wrong, tokens)
    for _ in range(100):
        tokens.append(7)
        ahead.decode(7)
    assert 2 <= wrong.calls <= 6
    ahead.settle()
    assert generator.engine.tokens == tokens
