"""Chooses which matrices get 8 bits, so that the model stays within a loss budget."""

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
    """Raise groups of matrices to a better format until the loss of the others is small enough.

    Losses of different groups almost add up: each is mostly the square of a small change, and the
    changes are independent. The groups with the most loss per added byte are raised first.

    Args:
        config: the model's.
        plan: canonical name to the preferred format.
        better: canonical name to the better format, which is assumed to lose nothing.
        groups: group name to the matrices that are raised together.
        losses: group name to the loss that quantizing only this group causes.
        most: the maximum total loss, in the units of `losses`.

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
