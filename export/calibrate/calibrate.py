"""Calibrates a model block by block: balances activations and rounds weights with input
statistics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from export.calibrate.balance import BalancedWeights
from export.calibrate.gptq import feedbacks, gptq
from export.calibrate.input_statistics import InputStatistics
from export.calibrate.observe import OBSERVED, observe
from export.calibrate.reference import embedded
from export.calibrate.workspace import Workspace
from export.formats.formats import Format, Plan
from export.formats.packing import Quantized, pack_bits, unpack_bits
from gemma_keras.checkpoints.names import weight_specs
from gemma_keras.config import GemmaConfig

_FEW_BITS = 4  # at most these are worth rounding with error feedback
_LARGE = 1 << 24  # numbers in matrices that are not rounded beside others, to save memory


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A model prepared for rounding.

    Attributes:
        weights: the same model with balanced activations.
        workspace: stores the matrices that were rounded with error feedback.
    """

    weights: BalancedWeights
    workspace: Workspace

    def rounded(self, name: str, fmt: Format) -> Quantized | None:
        """A matrix as it was rounded to `fmt`; `None` if it was not."""
        parts = self.workspace.load(name)
        if parts is None or fmt != Format(*parts["format"].tolist()):
            return None
        return _unpacked(parts, fmt)


def calibrate(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    ids: np.ndarray,
    plan: Plan,
    workspace: Workspace,
    keep: Collection[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibrated:
    """Balance every block, and round its low-bit matrices with error feedback.

    The results of each block are stored, so that an interrupted run can continue.

    Args:
        config: the model's.
        weights: canonical name to float32 array.
        ids: of the text, `(batch, length)`.
        plan: canonical name to format.
        workspace: where the results go.
        keep: matrices that are neither balanced nor rounded.
        on_progress: called with (blocks done, all of them).
    """
    balanced = BalancedWeights(config, weights)
    done = 0
    x = None
    while done < len(config.layers) and (block := workspace.load(f"block.{done}")) is not None:
        balanced.balance_block(done, block, keep)
        done += 1
    if done:
        state = workspace.load("state")
        if state is not None and int(state["blocks"]) == done:
            x = state["x"]
        elif done < len(config.layers):  # it stopped between two writes: start again
            done, balanced = 0, BalancedWeights(config, weights)
    on_progress(done, len(config.layers))
    if done < len(config.layers):
        if x is None:
            x = embedded(config, weights, ids)
        for i, statistics in enumerate(observe(config, weights, x, done), start=done):
            rms = {name: statistic.rms for name, statistic in statistics.items()}
            balanced.balance_block(i, rms, keep)
            for name, fmt, quantized in _round_block(config, balanced, i, statistics, plan, keep):
                workspace.save(name, _packed(quantized, fmt))
            statistics.clear()  # they would be in memory beside those of the next block
            workspace.save(f"block.{i}", rms)
            workspace.save("state", {"blocks": np.array(i + 1), "x": x})
            on_progress(i + 1, len(config.layers))
    return Calibrated(balanced, workspace)


def _round_block(
    config: GemmaConfig,
    weights: BalancedWeights,
    i: int,
    statistics: Mapping[str, InputStatistics],
    plan: Plan,
    keep: Collection[str],
) -> Iterator[tuple[str, Format, Quantized]]:
    """Round the matrices of one block, those that see the same inputs together."""
    specs = weight_specs(config)
    jobs: list[tuple[list[str], InputStatistics, Format]] = []
    for observed, names in OBSERVED.items():
        formats: dict[Format, list[str]] = {}
        for name in (f"layers.{i}.{n}" for n in names):
            if plan[name].bits <= _FEW_BITS and name not in keep:
                formats.setdefault(plan[name], []).append(name)
        for fmt, together in formats.items():
            jobs.append((together, statistics[observed], fmt))

    def run(
        job: tuple[list[str], InputStatistics, Format],
    ) -> Iterator[tuple[str, Format, Quantized]]:
        names, seen, fmt = job
        feedback = feedbacks(seen, weights.input_factors(names[0]))
        # Values that matrices with the same input share are computed once; only one matrix is in
        # memory at a time.
        if len(names) > 1:
            feedback = list(feedback)
        for name in names:
            yield name, fmt, gptq(weights[name].T, feedback, fmt)

    sizes = [sum(math.prod(specs[name].shape) for name in names) for names, _, _ in jobs]
    if max(sizes, default=0) >= _LARGE:
        for job in jobs:  # in this thread, which hears Ctrl-C between two products
            yield from run(job)
        return
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(lambda job: list(run(job)), jobs):
            yield from results


def _packed(quantized: Quantized, fmt: Format) -> dict[str, np.ndarray]:
    parts = {
        "levels": pack_bits(quantized.levels, fmt.bits),
        "scales": quantized.scales,
        "format": np.array(dataclasses.astuple(fmt)),
    }
    if quantized.zero_points is not None:
        parts["zero_points"] = quantized.zero_points
    return parts


def _unpacked(parts: Mapping[str, np.ndarray], fmt: Format) -> Quantized:
    levels = unpack_bits(parts["levels"], fmt.bits, fmt.block_size)
    return Quantized(levels, parts["scales"], parts.get("zero_points"))
