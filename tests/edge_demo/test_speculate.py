"""Guessed tokens: the text stays that of plain decoding, and the engine holds what it would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo import kv_cache
from edge_demo.bundle import Bundle
from edge_demo.engine import CandidateEngine, Engine
from edge_demo.generator import Generation, Generator
from edge_demo.sampling import Sampler
from edge_demo.speculate import PromptLookup, Speculator
from edge_demo.tokenizer import Tokenizer
from tests.models import GENERATIONS, WINDOW

BOS = 2
SLACK = 3


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    """Windows and buffers whose ends a text of a few tokens crosses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_STEP", 8)
        patch.setattr(kv_cache, "_SLACK", SLACK)
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
    generation = Generation(text(6))
    oracle = Oracle(text(6) + expected.ids)
    pieces = guessing.stream(generation.prompt_ids, Sampler(), 30, generation, oracle)
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
