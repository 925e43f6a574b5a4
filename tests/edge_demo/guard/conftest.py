"""A judge on the small guard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.guard.judge import Judge
from edge_demo.guard.template import POLICIES, Policy
from edge_demo.text.tokenizer import Tokenizer


def judge_on(path: Path, policies: tuple[Policy, ...] = POLICIES, cache_bytes: int = 0) -> Judge:
    """On an engine of its own."""
    bundle = Bundle.open(path)
    return Judge(Engine(bundle, threads=1), Tokenizer(bundle), policies, cache_bytes)


@pytest.fixture
def fresh(tiny_guard) -> Callable[..., Judge]:
    """Makes judges that have judged nothing."""
    return lambda *arguments: judge_on(tiny_guard, *arguments)
