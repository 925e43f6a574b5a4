"""Two bundles that fit into memory one by one, and not together."""

from __future__ import annotations

import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.device.memory_limits import MemoryLimit
from edge_demo.engine import memory
from edge_demo.engine.two_models import check_both_fit
from edge_demo.errors import TooLittleMemoryError


@pytest.fixture
def two(tiny_bundles):
    return [Bundle.open(tiny_bundles / name) for name in ("chat", "wide-int8")]


def needs(bundle: Bundle, texts: int) -> int:
    graph = bundle.candidates or bundle.engine
    return memory.estimate(bundle, graph, chunk=memory.CHUNKS[-1], texts=texts).resident


def test_both_are_counted_and_force_runs_them(two, monkeypatch):
    first, second = two
    graph = first.candidates or first.engine
    alone = max(needs(first, 5), needs(second, 1))
    together = None
    for room in range(alone, 3 * alone, alone // 200):
        limit = MemoryLimit("in this test", "resident", room)
        monkeypatch.setattr(memory, "memory_limits", lambda limit=limit: [limit])
        # what this process holds already is none of the estimate's
        monkeypatch.setattr(memory, "read_sizes", lambda text: {})
        try:
            check_both_fit(first, graph, 5, second)
        except TooLittleMemoryError as error:
            assert room < 3 * alone and first.name in str(error) and second.name in str(error)
            check_both_fit(first, graph, 5, second, force=True)
            continue
        together = room
        break
    # Python and its libraries are there once, the second's weights and cache beside the first's
    assert together is not None and together > alone
    weights = memory.estimate(second, second.engine).weights
    assert together - needs(first, 5) >= weights
