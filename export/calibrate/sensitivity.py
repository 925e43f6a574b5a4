"""Estimates, in one pass over the weights, the KL divergence that quantizing each group of matrices
causes.

The model runs block by block on one copy of the hidden states for each group of matrices. In each
copy only that group is quantized. So the weights are read once, and a model of any size can be
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from edge_demo.evaluate.perplexity import kl_divergence
from export.calibrate.reference import BlockLoader, embedded, head_logits, run_block, table_rows
from export.formats.formats import Format, Plan
from export.formats.fused_matrices import joined_name
from export.formats.packing import Quantized
from gemma_keras.checkpoints.names import head_table
from gemma_keras.config import GemmaConfig

# Matrices of a block that get the same bits: they have similar size and effect. Query, key and
# value could be one product of three, but the query would then get 8 bits nearly everywhere.
_GROUPS = (
    ("attention.query",),
    ("attention.key", "attention.value"),
    ("attention.output",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)
_MOST_TYPICAL = 10
_LIKELY = 256  # tokens at each position that the divergence is taken over


def group_members(
    config: GemmaConfig, plan: Plan, keep: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Group name, such as `layers.3.mlp.gate+up`, to its matrices of fewer than 8 bits.

    Matrices in `keep` are excluded.
    """
    groups = {}
    for i in range(len(config.layers)):
        for names in _GROUPS:
            here = [f"layers.{i}.{n}" for n in names]
            members = tuple(n for n in here if plan[n].bits < 8 and n not in keep)
            if members:
                groups[joined_name(here)] = members
    return groups


def sensitivities(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    plan: Plan,
    rounded: Callable[[str, Format], Quantized],
    groups: Mapping[str, Sequence[str]],
    ids: np.ndarray,
    positions: np.ndarray,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Returns the mean KL divergence from the float model if only one group of matrices is
    quantized.

    It is computed over the tokens that are likely at some position. They have nearly all of the
    probability, and need only a small part of the head. A position counts at most as ten typical
    ones, so that a single one does not decide which groups get 8 bits.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        plan: canonical name to format.
        rounded: a matrix as it would be stored.
        groups: as `group_members` gives them.
        ids: of the text, `(batch, length)`.
        positions: of each row, those that count.
        on_progress: called with (states advanced so far, all of them).

    Returns:
        Group name to nats.
    """
    num_blocks = len(config.layers)
    per_block = [
        {group: names for group, names in groups.items() if group.startswith(f"layers.{i}.")}
        for i in range(num_blocks)
    ]
    states = {"": embedded(config, weights, ids)}  # the exact one, then one for each group
    total = num_blocks + sum(len(here) * (num_blocks - i) for i, here in enumerate(per_block))
    done = 0
    blocks = BlockLoader(config, weights)
    for i, here in enumerate(per_block):
        block = blocks.load(i)
        fresh = {group: states[""].copy() for group in here}
        for state in states.values():
            run_block(block, state)
            done += 1
            on_progress(done, total)
        for group, state in fresh.items():
            for name in here[group]:
                values = rounded(name, plan[name]).values(plan[name], weights[name].shape[0])
                block.variable(name.removeprefix(f"layers.{i}.")).assign(values.T)
            run_block(block, state)
            for name in here[group]:
                block.variable(name.removeprefix(f"layers.{i}.")).assign(weights[name])
            done += 1
            on_progress(done, total)
        states |= fresh

    picked = {
        group: state[:, positions].reshape(-1, config.hidden_dim) for group, state in states.items()
    }
    logits = head_logits(config, weights, picked[""])
    count = min(_LIKELY, config.vocabulary_size)
    likely = np.unique(np.argpartition(logits, -count, axis=-1)[:, -count:])
    reference = logits[:, likely]
    rows = table_rows(config, weights, head_table(config), likely)
    losses = {}
    for group in groups:
        quantized = head_logits(config, weights, picked[group], rows)
        divergences = kl_divergence(reference, quantized)
        typical = float(np.median(divergences))
        losses[group] = float(np.minimum(divergences, _MOST_TYPICAL * typical).mean())
    return losses
