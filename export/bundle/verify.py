"""Compares a written bundle with the Keras model that it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_demo.bundle.manifest import ANY_TARGET
from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.errors import EdgeError
from edge_demo.evaluate.perplexity import kl_divergence
from edge_demo.text.tokenizer import Tokenizer
from export.calibrate.reference import reference_logits
from export.errors import ExportError
from export.formats.recipes import recipe_named
from export.graph.run_in_chunks import logits_in_chunks
from gemma_keras.config import GemmaConfig

TEXT = Path(__file__).with_name("verification.txt")
_BATCH = 64
_MOST_OF_INT8_CACHE = 0.01  # what keys and values as integers may cost alone
_DECODED = 32  # of the text's tokens
_MOST_BYTES_WHOLE = 1 << 30  # of a bundle; onnxruntime holds most of them twice


@dataclasses.dataclass(frozen=True)
class Quality:
    """How close a bundle is to the model that it was made from.

    Attributes:
        max_logit_difference: largest absolute difference of any logit.
        logit_spread: standard deviation of the reference's logits, to judge it by.
        same_top_token: share of positions whose most likely token is the same.
        mean_kl: mean Kullback-Leibler divergence of the next-token distributions, in nats, from
            the reference to the bundle.
        tokens: positions compared.
        against: a description of the reference.
    """

    max_logit_difference: float
    logit_spread: float
    same_top_token: float
    mean_kl: float
    tokens: int
    against: str

    @property
    def line(self) -> str:
        """The same for people."""
        return (
            f"mean KL {self.mean_kl:.2g} nats, same top token {self.same_top_token:.1%}, "
            f"greatest logit difference {self.max_logit_difference:.2g} (logits spread "
            f"{self.logit_spread:.2g}), {self.tokens} tokens, {self.against}"
        )


def compare_logits(reference: np.ndarray, measured: np.ndarray, against: str) -> Quality:
    """Compare two float32 arrays `(positions, vocabulary_size)`."""
    divergences = []
    greatest = 0.0
    for first in range(0, len(reference), _BATCH):
        p, q = reference[first : first + _BATCH], measured[first : first + _BATCH]
        greatest = max(greatest, float(np.abs(p - q).max()))
        divergences.append(kl_divergence(p, q))
    return Quality(
        max_logit_difference=greatest,
        logit_spread=float(reference.std()),
        same_top_token=float((reference.argmax(axis=-1) == measured.argmax(axis=-1)).mean()),
        mean_kl=float(np.concatenate(divergences).mean()),
        tokens=len(reference),
        against=against,
    )


def verify(
    bundle: Bundle, config: GemmaConfig, weights: Mapping[str, np.ndarray], recipe: str
) -> Quality:
    """Run the bundle and the Keras layers on the fixed text of `verification.txt`.

    The engine runs it; of a bundle that would take too much memory, its interchange graph is run
    chunk by chunk.

    Raises:
        ExportError: the bundle does not run, or differs more than the recipe allows, so the graph
            is wrong.
    """
    import keras

    ids = Tokenizer(bundle).encode(TEXT.read_text(encoding="utf-8"))
    rows = np.array([ids[: min(192, bundle.context_length)]], np.int32)
    positions = np.arange(rows.shape[1])
    reference = reference_logits(config, weights, rows, positions)
    if bundle.num_bytes > _MOST_BYTES_WHOLE:
        measured = logits_in_chunks(bundle.path, config, rows, positions)
    else:
        measured = _engine_logits(bundle, rows[0].tolist())
    against = f"against the Keras layers on {keras.config.backend()} in float32"
    quality = compare_logits(reference, measured, against)
    most = recipe_named(recipe).most_kl
    if any(spec.dtype == "int8" for spec in bundle.engine.inputs):
        most = max(most, _MOST_OF_INT8_CACHE)
    if not quality.mean_kl <= most:
        raise ExportError(
            "the exported model differs from the Keras model: mean KL "
            f"{quality.mean_kl:.3g}, but the limit for {recipe} is {most:g}; nothing was "
            "written"
        )
    return quality


def _engine_logits(bundle: Bundle, ids: list[int]) -> np.ndarray:
    """Logits at each position; bundles for a target decode the last ones token by token, which
    their graphs compute in another way."""
    alone = min(_DECODED, len(ids) - 1) if bundle.target != ANY_TARGET else 0
    together = len(ids) - alone
    try:
        engine = Engine(bundle)
        rows = list(engine.all_logits(ids[:together]))
        rows += [engine.decode(token)[None].copy() for token in ids[together:]]
        return np.concatenate(rows)
    except EdgeError as error:
        raise ExportError(f"the exported model does not run: {error}") from error
