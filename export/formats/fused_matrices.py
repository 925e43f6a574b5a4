"""Finds fused matrices (QKV, gate-up): they multiply the same input and are stored together.

A runtime then rounds the input once and hands its threads one larger piece of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from export.formats.formats import Plan
from gemma_keras.config import GemmaConfig

# The matrices of a block, those that see the same input together.
SAME_INPUT = (
    ("attention.query", "attention.key", "attention.value"),
    ("attention.output",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)


def fused_matrices(config: GemmaConfig, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Matrices of one quantized format that are stored together, by the name of the first."""
    fused = {}
    for i in range(len(config.layers)):
        for group in SAME_INPUT:
            for run in _runs([f"layers.{i}.{name}" for name in group], plan):
                if len(run) > 1 and plan[run[0]].quantized:
                    fused[run[0]] = run
    return fused


def _runs(names: Sequence[str], plan: Plan) -> Iterator[tuple[str, ...]]:
    """Cut the names where the format changes."""
    first = 0
    for end in range(1, len(names) + 1):
        if end == len(names) or plan[names[end]] != plan[names[first]]:
            yield tuple(names[first:end])
            first = end


def joined_name(names: Sequence[str]) -> str:
    """Returns the name of fused matrices, such as `layers.0.mlp.gate+up`."""
    first, *others = names
    return "+".join([first, *(name.rpartition(".")[2] for name in others)])
