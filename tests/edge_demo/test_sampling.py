"""The sampler against a slow and obvious one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from edge_demo.errors import RequestError
from edge_demo.text.sampling import Sampler


def reference(logits, temperature, top_k, top_p):
    """`[(id, probability)]`, most likely first, and how near top-p's sum came to a tie."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or None]
    weights = [math.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order]
    kept, mass, nearest = [], 0.0, 1.0
    for i, weight in zip(order, weights, strict=True):
        kept.append((i, weight))
        mass += weight / sum(weights)
        nearest = min(nearest, abs(mass - top_p))
        if mass >= top_p:
            break
    total = sum(weight for _, weight in kept)
    return [(i, weight / total) for i, weight in kept], nearest


# Few different values, so that ties are common.
LOGITS = st.lists(
    st.one_of(st.sampled_from([-1.0, 0.0, 2.5]), st.floats(-30, 30, width=32)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    logits=LOGITS,
    temperature=st.floats(0.05, 100),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
)
@example(logits=[1.0] * 20, temperature=1.0, top_k=7, top_p=1.0)
def test_distribution_is_that_of_the_obvious_sampler(logits, temperature, top_k, top_p):
    expected, nearest = reference(logits, temperature, top_k, top_p)
    assume(top_p == 1 or nearest > 1e-9)  # rounding decides
    sampler = Sampler(temperature, top_k, top_p)
    ids, probabilities = sampler.distribution(np.array(logits, np.float32))
    if top_p < 1:
        assert ids.tolist() == [i for i, _ in expected]
    assert ids.tolist()[: len(expected)] == [i for i, _ in expected]
    np.testing.assert_allclose(
        probabilities[: len(expected)], [p for _, p in expected], rtol=1e-9, atol=1e-12
    )
    assert abs(probabilities.sum() - 1) < 1e-12


@pytest.mark.parametrize(
    "settings", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.8), (1.5, 5, 0.9)]
)
def test_picks_are_as_frequent_as_the_probabilities_say(settings):
    logits = np.array([0.3, 1.9, -0.4, 1.9, 0.8, -2.0, 1.1], np.float32)
    expected = dict(reference(logits.tolist(), *settings)[0])
    sampler, draws = Sampler(*settings, seed=7), 20_000
    counts = np.bincount([sampler.pick(logits) for _ in range(draws)], minlength=len(logits))
    assert set(np.flatnonzero(counts)) <= set(expected)
    statistic = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    freedom = len(expected) - 1
    # The 99.9 % point of chi-square, by Wilson and Hilferty's cube.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_greedy_takes_the_greatest_and_of_equals_the_first():
    logits = np.array([0.0, 3.0, -1.0, 3.0], np.float32)
    assert {Sampler().pick(logits) for _ in range(5)} == {1}
    assert Sampler(temperature=1.0, top_k=1).pick(logits) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_temperature_near_0_is_greedy(temperature):
    logits = np.array([0.0, 3.0, -30.0, 2.0], np.float32)
    ids, probabilities = Sampler(temperature).distribution(logits)
    assert ids[0] == 1 and probabilities[0] == 1
    assert Sampler(temperature, seed=1).pick(logits) == 1


def test_the_highest_temperature_is_nearly_even():
    _, probabilities = Sampler(100.0).distribution(np.array([0.0, 1.0], np.float32))
    np.testing.assert_allclose(probabilities, [0.5025, 0.4975], atol=1e-4)


def test_of_equal_logits_at_the_edge_of_top_k_the_first_ids_stay():
    logits = np.zeros(1000, np.float32)
    logits[700] = 1
    ids, _ = Sampler(1.0, top_k=5).distribution(logits)
    assert ids.tolist() == [700, 0, 1, 2, 3]


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    ids, probabilities = Sampler(1.0, top_p=top_p).distribution(np.zeros(4, np.float32))
    assert ids.tolist() == list(range(kept))
    np.testing.assert_allclose(probabilities, 1 / kept)


def test_a_seed_repeats_and_another_differs():
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32)
    first, again, other = (
        [sampler.pick(logits) for _ in range(50)]
        for sampler in (Sampler(1.0, seed=1), Sampler(1.0, seed=1), Sampler(1.0, seed=2))
    )
    assert first == again != other
    unseeded = [
        [sampler.pick(logits) for _ in range(50)] for sampler in (Sampler(1.0), Sampler(1.0))
    ]
    assert unseeded[0] != unseeded[1]


def test_the_logits_are_left_as_they_were():
    logits = np.random.default_rng(0).normal(size=30).astype(np.float32)
    before = logits.copy()
    Sampler(0.7, 5, 0.9).pick(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 100.1}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": -1.0}, "top-p"),
        ({"top_p": 1.01}, "top-p"),
        ({"top_p": math.nan}, "top-p"),
        ({"seed": -1}, "seed"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(arguments, named):
    with pytest.raises(RequestError, match=f"{named} .*{next(iter(arguments.values()))}"):
        Sampler(**arguments)
