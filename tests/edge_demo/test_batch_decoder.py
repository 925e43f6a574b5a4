"""Texts decoded together, against each of them decoded alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.batch_decoder import BatchDecoder
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import RequestError
from tests.edge_demo.conftest import short_boundaries
from tests.edge_demo.make_bundles import SHORT_CONTEXT
from tests.models import GENERATIONS, VOCABULARY_SIZE, WINDOW

STEP, SLACK, PREFILL_CHUNK = 8, 3, 5
TOLERANCE = 1e-4
LENGTHS = [
    n + d for n in (2, WINDOW, WINDOW + SLACK, STEP, 2 * (WINDOW + SLACK), 40) for d in (-1, 0, 1)
]


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    with short_boundaries(STEP, SLACK, PREFILL_CHUNK):
        yield


@pytest.fixture(scope="module", params=[*(f"{g}-fp32" for g in GENERATIONS), "gemma3-board"])
def engines(request, tiny_bundles):
    bundle = Bundle.open(tiny_bundles / request.param)
    return {kind: kind(bundle, threads=1) for kind in (Engine, CandidateEngine)}


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


def dense(found):
    """All logits, those that are no candidates being 0, so that both kinds can be compared."""
    if isinstance(found, np.ndarray):
        return found.copy()
    logits = np.zeros(VOCABULARY_SIZE, np.float32)
    logits[found.ids] = found.logits
    return logits


def put(rows, row, engine, ids):
    engine.rewind(0)
    engine.prefill(ids)
    rows.put(row, engine.snapshot())


def alone(engine, ids, new):
    engine.rewind(0)
    engine.prefill(ids)
    return np.stack([dense(engine.decode(token)) for token in new])


def together(engine, rows, texts, steps):
    """Each row's logits, `(steps, vocabulary)`; a row's new tokens are a text of its number."""
    for row, ids in texts.items():
        put(rows, row, engine, ids)
    new = {row: text(steps, 100 + row) for row in texts}
    found = {row: [] for row in texts}
    for step in range(steps):
        for row, logits in rows.decode({row: new[row][step] for row in texts}).items():
            found[row].append(dense(logits))
    return {row: np.stack(logits) for row, logits in found.items()}, new


@pytest.mark.parametrize("kind", [Engine, CandidateEngine])
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_what_each_is_alone_at_every_boundary(engines, kind, length):
    engine = engines[kind]
    texts = {0: text(length), 1: text(1, 1), 2: text(33, 2), 3: text(length, 3)}
    found, new = together(engine, BatchDecoder(engine, 4), texts, WINDOW + 2 * SLACK)
    for row, ids in texts.items():
        expected = alone(engine, ids, new[row])
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=TOLERANCE)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 5),
    rounds=st.lists(
        st.tuples(st.dictionaries(st.integers(0, 4), st.integers(1, 50)), st.integers(1, 20)),
        min_size=1, max_size=3,
    ),
)  # fmt: skip
def test_rows_that_come_and_go_are_what_each_is_alone(engines, count, rounds):
    engine = engines[Engine]
    rows = BatchDecoder(engine, count)
    for number, (lengths, steps) in enumerate(rounds):
        texts = {row % count: text(n, [number, row]) for row, n in lengths.items()}
        found, new = together(engine, rows, texts, steps if texts else 0)
        for row, ids in texts.items():
            assert rows.lengths[row] == len(ids) + steps
            expected = alone(engine, ids, new[row])
            np.testing.assert_allclose(found[row], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int8-cache"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_row_does_not_know_its_place_nor_its_neighbours(tiny_bundles, recipe, count):
    engine = Engine(Bundle.open(tiny_bundles / f"gemma3-{recipe}"), threads=1)
    expected = None
    for row in range(count):
        for others in ((), range(count)):
            texts = {other: text(3 + 11 * other, other) for other in others} | {row: text(20)}
            rows = BatchDecoder(engine, count)
            for other, ids in texts.items():
                put(rows, other, engine, ids)
            found = []
            for step in range(15):
                logits = rows.decode({other: (7 * step + other - row) % 200 for other in texts})
                found.append(logits[row].tobytes())
            assert expected is None or found == expected
            expected = found


def test_a_row_can_fill_the_context_and_no_more(tiny_bundles):
    engine = Engine(Bundle.open(tiny_bundles / "short"), threads=1)
    rows = BatchDecoder(engine, 2)
    put(rows, 0, engine, text(SHORT_CONTEXT - 1))
    put(rows, 1, engine, text(4))
    found = rows.decode({0: 5, 1: 6})
    expected = alone(engine, text(SHORT_CONTEXT - 1), [5])[0]
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(RequestError, match="context of 16"):
        rows.decode({0: 5, 1: 6})
    found = rows.decode({1: 7})  # what was refused has changed nothing
    expected = alone(engine, text(4), [6, 7])[1]
    np.testing.assert_allclose(found[1], expected, rtol=0, atol=TOLERANCE)


def test_the_engine_keeps_what_it_holds(engines):
    engine = engines[Engine]
    rows = BatchDecoder(engine, 2)
    put(rows, 1, engine, text(30))
    expected = alone(engine, text(20, 5), [1, 2])
    engine.rewind(0)
    engine.prefill(text(20, 5))
    for token in (1, 2):
        rows.decode({1: 9})
        np.testing.assert_array_equal(engine.decode(token), expected[token - 1])
    assert engine.tokens == [*text(20, 5), 1, 2]
