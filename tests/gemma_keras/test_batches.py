"""Batches of examples: what stands where, packed or not, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras.train.batches import RowBatches
from gemma_keras.train.examples import Example
from gemma_keras.train.packing import pack

pytestmark = [pytest.mark.keras, pytest.mark.backends("torch")]


def example(*ids, said=()):
    return Example(np.array(ids, np.int32), np.isin(ids, said or ids[1:]))


EXAMPLES = [example(2, 10, 11, 12, said=(11, 12)), example(2, 20, 21), example(2, 30, 1)]


# --- packing -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n)))))
def test_each_example_is_in_one_row_that_has_room(case):
    capacity, sizes = case
    rows = pack(sizes, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    used = [sum(sizes[index] for index in row) for row in rows]
    assert all(0 < n <= capacity for n in used)
    # two rows never fit into one: the best fit would have put one's examples into the other
    assert sum(2 * n <= capacity for n in used) <= 1


def test_best_fit_decreasing_by_hand():
    # 7 | 6 + 3 | 5 + 4: the 4 goes to the 5, whose room it fills best
    assert pack([3, 7, 4, 5, 6], 9) == [[1], [0, 4], [2, 3]]


# --- what stands where ---------------------------------------------------------------------------


def test_a_row_of_one_example():
    (inputs, targets, weights) = RowBatches(EXAMPLES, 5, 2)[0]
    assert inputs["token_ids"].tolist() == [[2, 10, 11, 0, 0], [2, 20, 0, 0, 0]]
    assert inputs["padding_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert targets.tolist() == [[10, 11, 12, 0, 0], [20, 21, 0, 0, 0]]
    assert weights.tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_the_last_batch_is_filled_with_what_does_not_count():
    batches = RowBatches(EXAMPLES, 5, 2)
    inputs, _, weights = batches[1]
    assert batches.num_batches == 2
    assert inputs["padding_mask"].tolist() == [[1, 1, 0, 0, 0], [0] * 5]
    assert weights.tolist() == [[1, 1, 0, 0, 0], [0] * 5]


def test_a_row_of_several_examples():
    batches = RowBatches(EXAMPLES, 7, 1, packed=True)
    inputs, targets, weights = batches[0]
    assert batches.rows == batches.num_batches == 1
    assert inputs["token_ids"].tolist() == [[2, 10, 11, 2, 20, 2, 30]]
    assert inputs["padding_mask"].tolist() == [[1, 1, 1, 4, 4, 6, 6]]
    assert targets.tolist() == [[10, 11, 12, 20, 21, 30, 1]]
    assert weights.tolist() == [[0, 1, 1, 1, 1, 1, 1]]


def test_padding_has_the_id_of_padding():
    inputs, targets, _ = RowBatches(EXAMPLES, 5, 2, pad=9)[1]
    assert inputs["token_ids"][1].tolist() == targets[1].tolist() == [9] * 5


def test_a_batch_is_no_larger_than_the_rows_there_are():
    assert RowBatches(EXAMPLES, 5, 1000)[0][1].shape == (3, 5)
    assert RowBatches(EXAMPLES, 5, 2, filled=False)[1][1].shape == (1, 5)


# --- order ---------------------------------------------------------------------------------------

MANY = [example(2, 100 + i) for i in range(23)]


def order_of(batches, passes=1):
    n = batches.of_a_pass
    return [
        [i for k in range(p * n, (p + 1) * n) for i in batches[k][1][:, 0] if i]
        for p in range(passes)
    ]


def test_an_order_depends_on_seed_and_pass_alone():
    first, second = order_of(RowBatches(MANY, 4, 5, seed=3), passes=2)
    assert first != second and sorted(first) == sorted(second) == list(range(100, 123))
    assert order_of(RowBatches(MANY, 4, 7, seed=3), passes=2) == [first, second]
    assert order_of(RowBatches(MANY, 4, 5, seed=4)) != [first]
    assert order_of(RowBatches(MANY, 4, 5), passes=2) == [list(range(100, 123))] * 2


# --- accumulated gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("first", "steps"), [(0, 2), (0, 3), (1, 3), (2, 4)])
def test_tokens_of_accumulated_batches_weigh_the_same(seed, first, steps):
    """A batch's loss is its sum over its count; the optimizer takes the mean of `steps` of them."""
    lengths = np.random.default_rng(1).integers(2, 12, 17)
    examples = [example(*range(2, 3 + n)) for n in lengths]
    batches = RowBatches(examples, 12, 2, seed=seed, accumulated=steps, first=first)
    shares = []
    for n in range(4 * batches.of_a_pass):
        weights = batches[n][2]
        counts = weights != 0
        assert np.allclose(weights[counts], weights[counts][0])
        shares.append((int(counts.sum()), weights[counts][0] / counts.sum() / steps))
    for begin in range(-first % steps, len(shares) - steps + 1, steps):
        group = shares[begin : begin + steps]
        of_a_token = 1 / sum(count for count, _ in group)
        assert [share for _, share in group] == pytest.approx([of_a_token] * steps, rel=1e-5)
