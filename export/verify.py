"""Comparing what was written with the Keras model it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_demo.bundle import Bundle
from edge_demo.engine import Engine
from edge_demo.errors import EdgeError
from edge_demo.score import kl_divergence
from edge_demo.tokenizer import Tokenizer
from export.errors import ExportError
from export.reference import reference_logits
from gemma_keras.config import GemmaConfig

TEXT = Path(__file__).with_name("verification.txt")
# What a recipe may lose at most before its bundle is refused: mean KL, in nats. The 270M loses
# 1e-11 as fp32, 1e-3 as int8, 0.5 as int4 rounded to nearest everywhere; a random model as int8 up
# to 0.02; a wrong graph whole nats.
_MOST_MEAN_KL = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.1, "int4": 2.0}
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Quality:
    """How near a bundle is to the model it was made from.

    Attributes:
        max_logit_difference: greatest absolute difference of any logit.
        logit_spread: standard deviation of the reference's logits, to judge it by.
        same_top_token: share of positions whose most likely token is the same.
        mean_kl: mean Kullback-Leibler divergence of the next-token distributions, in nats, from
            the reference to the bundle.
        tokens: positions compared.
        against: what the reference is.
    """

    max_logit_difference: float
    logit_spread: float
    same_top_token: float
    mean_kl: float
    tokens: int
    against: str


def compare_logits(reference: np.ndarray, found: np.ndarray, against: str) -> Quality:
    """Compare two float32 arrays `(positions, vocabulary_size)`."""
    divergences = []
    greatest = 0.0
    for first in range(0, len(reference), _BATCH):
        p, q = reference[first : first + _BATCH], found[first : first + _BATCH]
        greatest = max(greatest, float(np.abs(p - q).max()))
        divergences.append(kl_divergence(p, q))
    return Quality(
        max_logit_difference=greatest,
        logit_spread=float(reference.std()),
        same_top_token=float((reference.argmax(axis=-1) == found.argmax(axis=-1)).mean()),
        mean_kl=float(np.concatenate(divergences).mean()),
        tokens=len(reference),
        against=against,
    )


def measure(
    bundle: Bundle, ids: np.ndarray, positions: np.ndarray, reference: np.ndarray, against: str
) -> Quality:
    """Run a bundle on rows of tokens and compare its logits.

    Args:
        bundle: to judge.
        ids: `(batch, length)`.
        positions: of each row, those to compare, in order.
        reference: float32 `(batch * len(positions), vocabulary_size)`, row after row.
        against: what the reference is.

    Raises:
        ExportError: the bundle does not run.
    """
    first = int(positions[0])
    try:
        engine = Engine(bundle)
        found = []
        for row in ids.tolist():
            engine.rewind(0)
            if first:
                engine.prefill(row[:first])
            logits = np.concatenate(list(engine.all_logits(row[first:])))
            found.append(logits[positions - first])
    except EdgeError as error:
        raise ExportError(f"the exported model does not run: {error}") from error
    return compare_logits(reference, np.concatenate(found), against)


def verify(
    bundle: Bundle, config: GemmaConfig, weights: Mapping[str, np.ndarray], recipe: str
) -> Quality:
    """Run the bundle and the Keras layers on the fixed text of `verification.txt`.

    Raises:
        ExportError: they differ by more than the recipe can explain, so the graph is wrong.
    """
    import keras

    ids = Tokenizer(bundle).encode(TEXT.read_text(encoding="utf-8"))
    rows = np.array([ids[: min(192, bundle.context_length)]], np.int32)
    positions = np.arange(rows.shape[1])
    reference = reference_logits(config, weights, rows, positions)
    against = f"against the Keras layers on {keras.config.backend()} in float32"
    quality = measure(bundle, rows, positions, reference, against)
    most = _MOST_MEAN_KL[recipe]
    if not quality.mean_kl <= most:
        raise ExportError(
            f"the exported model differs from the Keras model: mean KL {quality.mean_kl:.3g} "
            f"where {recipe} may lose {most:g}; nothing was written"
        )
    return quality
