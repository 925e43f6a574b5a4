"""Which events of answers pass, and when: with the small guard, in a loop of this process."""

from __future__ import annotations

import asyncio

import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.guard.decisions import Guard
from edge_demo.server.http.guarding import Guarding
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.request import Prompt
from edge_demo.server.worker.job import Ended, Failed, Piece, Reading
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.guard.conftest import judge_on

PROMPTS = [Prompt(turns=(("user", "Hello"),))] * 2


@pytest.fixture
def make(tiny_guard):
    """Makes a guarding with one threshold for all policies, and the guard that it asks."""
    made = []

    def make(threshold, on="both", every=3, most_waiting=8):
        judge = judge_on(tiny_guard)
        guard = Guard(judge, {policy.name: threshold for policy in judge.policies})
        tokenizer = Tokenizer(Bundle.open(tiny_guard))
        made.append(Guarding(guard, tokenizer, on, every, most_waiting))
        return made[-1]

    yield make
    for one in made:
        one.close()


def passed(guarding, *batches, stream=True):
    """What passes of each batch of events."""

    async def run():
        watch = guarding.watch("id", PROMPTS, "", stream)
        return [await watch.passed(batch) for batch in batches]

    return asyncio.run(run())


def pieces(index, *texts):
    return [(index, Piece(text)) for text in texts]


def test_pieces_wait_for_a_judgment_and_keep_their_order(make):
    first, second = pieces(0, "A ", "fox "), pieces(0, "met ", "a ")
    other = pieces(1, "Hello")
    found = passed(
        make(1.0), [*first, (1, Reading(1, 2)), *other], second, [(0, Ended()), (1, Ended())]
    )
    assert found[0] == [(1, Reading(1, 2))]
    assert found[1] == first + second
    assert found[2] == [(0, Ended()), *other, (1, Ended())]


def test_a_violation_ends_one_answer_and_what_comes_later_is_dropped(make):
    guarding = make(1e-9)
    found = passed(guarding, pieces(0, "a", "b", "c"), [*pieces(0, "d"), (0, Ended())])
    assert found == [[(0, Ended("content_filter"))], []]
    assert guarding.guard.decisions["output", "refused"] == 1


def test_an_answer_that_the_guard_cannot_hold_ends_with_what_was_judged(make):
    short, long = pieces(0, "A ", "fox ", "met "), pieces(0, "a crow. " * 400, "b", "c")
    found = passed(make(1.0), short, long, pieces(0, "d", "e", "f"))
    assert found == [short, [(0, Ended("length"))], []]


def test_a_failure_comes_at_once_without_what_was_not_judged(make):
    failed = (0, Failed(ValueError("no")))
    assert passed(make(1.0), [*pieces(0, "a"), failed]) == [[failed]]


def test_an_answer_that_is_not_streamed_is_judged_at_its_end(make):
    guarding, said = make(1.0), pieces(0, *"abcdefgh")
    assert passed(guarding, said, [(0, Ended())], stream=False) == [[], [*said, (0, Ended())]]
    assert guarding.guard.decisions["output", "passed"] == 1


def test_a_guard_on_input_lets_answers_pass(make):
    guarding, said = make(1e-9, on="input"), pieces(0, "a")
    assert passed(guarding, said) == [said]
    assert sum(guarding.guard.decisions.values()) == 0
    with pytest.raises(Refusal, match="refused this prompt"):
        asyncio.run(guarding.admit("id", PROMPTS, ""))


def test_prompts_wait_only_so_many_at_once(make):
    guarding = make(1.0, most_waiting=2)

    async def run():
        asked = [guarding.admit("id", PROMPTS, "") for _ in range(4)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(run())
    assert found[:2] == [None, None]
    assert [refusal.status for refusal in found[2:]] == [429, 429]
    assert asyncio.run(guarding.admit("id", PROMPTS, "")) is None
