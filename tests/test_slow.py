"""The list of slow tests names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.slow import OTHERS, SLOW, is_slow

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", sorted({name for slow in SLOW for name in slow.tests}))
def test_a_slow_test_is_there(name):
    file, _, pattern = name.partition("::")
    beginning = re.split(r"\*|\[\[\]", pattern)[0]
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert any(f.startswith(beginning or "test_") for f in functions)


def test_a_reason_counts_on_its_backends_alone():
    assert OTHERS == ("jax", "tensorflow")
    name = "tests/export/test_fused.py::test_graph_keeps_its_contract"
    assert [is_slow(name, backend) for backend in (*OTHERS, "torch", "none")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_pattern_takes_some_parameters_and_leaves_others():
    name = (
        "tests/gemma_keras/test_models.py::test_call_in_chunks_over_a_cache_equals_the_whole_call"
    )
    slow = {p for p in ("1-gemma3", "7-gemma", "7-gemma3") if is_slow(f"{name}[{p}]", "jax")}
    assert slow == {"1-gemma3", "7-gemma"}
    assert not is_slow(f"{name}[1-gemma3]", "torch")


def test_what_uses_the_exported_sample_is_slow():
    name = "tests/edge_demo/test_commands.py::test_the_sample_speaks"
    assert is_slow(name, "none", ["sample_bundle"]) and not is_slow(name, "none", ["run"])
