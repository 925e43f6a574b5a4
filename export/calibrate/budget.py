"""Choosing which matrices get 8 bits, so that the whole stays within a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from export.formats.formats import Format, Plan, rows_and_inputs
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig


def plan_within(
    config: GemmaConfig,
    plan: Plan,
    better: Plan,
    groups: Mapping[str, Sequence[str]],
    losses: Mapping[str, float],
    most: float,
) -> dict[str, Format]:
    """Raise groups of matrices to a better format until what the others lose is small enough.

    Losses of different groups add up, nearly: in each, most of it is the square of a small
    change, and the changes are unrelated. Those that lose most for the bytes that they would cost
    are raised first.

    Args:
        config: the model's.
        plan: canonical name to the format it would like to keep.
        better: canonical name to the format to raise to, taken to lose nothing.
        groups: group name to the matrices that are raised together.
        losses: group name to what rounding it alone costs.
        most: what they may lose together, in the units of `losses`.

    Returns:
        The plan.
    """
    specs = weight_specs(config)

    def price(group: str) -> int:
        shapes = {name: rows_and_inputs(specs[name]) for name in groups[group]}
        return sum(
            better[name].num_bytes(*s) - plan[name].num_bytes(*s) for name, s in shapes.items()
        )

    chosen = dict(plan)
    left = sum(losses.values())
    for group in sorted(losses, key=lambda g: losses[g] / max(1, price(g)), reverse=True):
        if left <= most:
            break
        chosen |= {name: better[name] for name in groups[group]}
        left -= losses[group]
    return chosen
