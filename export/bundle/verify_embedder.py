"""Compares a written bundle of an embedder with the Keras model that it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.embedder import Embedder
from edge_demo.errors import EdgeError
from edge_demo.text.embedding import EmbeddingTokens
from edge_demo.text.tokenizer import Tokenizer
from export.bundle.verify import TEXT
from export.calibrate.reference import BlockLoader, embedded, run_block
from export.errors import ExportError
from export.formats.recipes import recipe_named
from gemma_keras.config import GemmaConfig


@dataclasses.dataclass(frozen=True)
class EmbedderQuality:
    """How close a bundle's vectors are to those of the model that it was made from.

    Attributes:
        least_cosine: of a text's vector to the reference's, over all texts.
        mean_cosine: the same in the mean.
        cosine_of_others: mean cosine of the reference's vectors of different texts, to judge it by.
        texts: compared.
        tokens: of all of them.
        against: a description of the reference.
    """

    least_cosine: float
    mean_cosine: float
    cosine_of_others: float
    texts: int
    tokens: int
    against: str

    @property
    def line(self) -> str:
        """The same for people."""
        return (
            f"cosine to the reference at least {self.least_cosine:.6f}, in the mean "
            f"{self.mean_cosine:.6f} (different texts {self.cosine_of_others:.2f}), {self.texts} "
            f"texts, {self.against}"
        )


def verify_embedder(
    bundle: Bundle,
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    projections: Sequence[np.ndarray],
    recipe: str,
) -> EmbedderQuality:
    """Run the bundle and the Keras layers on the paragraphs and sentences of `verification.txt`.

    Raises:
        ExportError: the bundle does not run, or differs more than the recipe allows, so the graph
            is wrong.
    """
    import keras

    try:
        embedder = Embedder(bundle)
        rows = _rows(embedder)
        found = embedder.vectors(rows)
    except EdgeError as error:
        raise ExportError(f"the exported model does not run: {error}") from error
    reference = reference_vectors(config, weights, projections, rows)
    cosines = np.sum(found * reference, axis=1, dtype=np.float64)
    between = (reference @ reference.T)[~np.eye(len(rows), dtype=bool)]
    quality = EmbedderQuality(
        least_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        cosine_of_others=float(between.mean()),
        texts=len(rows),
        tokens=sum(map(len, rows)),
        against=f"against the Keras layers on {keras.config.backend()} in float32",
    )
    least = 1 - recipe_named(recipe).most_cosine_distance
    if not quality.least_cosine >= least:
        raise ExportError(
            "the exported model differs from the Keras model: a cosine of "
            f"{quality.least_cosine:.6f}, but the limit for {recipe} is {least:g}; nothing was "
            "written"
        )
    return quality


def _rows(embedder: Embedder) -> list[list[int]]:
    """Tokens of texts of many lengths: all, paragraphs, sentences, a word, nothing."""
    whole = TEXT.read_text(encoding="utf-8")
    paragraphs = whole.split("\n\n")
    sentences = [part for paragraph in paragraphs for part in paragraph.split(". ")]
    tokens = EmbeddingTokens(embedder.spec, Tokenizer(embedder.bundle), embedder.longest)
    texts = [whole, *paragraphs, *sentences, "gull", ""]
    rows = tokens.of_texts(texts, truncate=True)
    for name in embedder.spec.prompts:
        rows += tokens.of_texts(sentences[:1], name, truncate=True)
    return list(map(list, dict.fromkeys(map(tuple, rows))))


def reference_vectors(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    projections: Sequence[np.ndarray],
    rows: Sequence[Sequence[int]],
) -> np.ndarray:
    """Vectors of the float model, one block in memory at a time, each text by itself.

    Args:
        config: of the model below the pooling.
        weights: canonical name to float array.
        projections: the matrices after it, float32 `(in, out)` each.
        rows: token ids of each text.

    Returns:
        float32 `(len(rows), dimensions)`, each of length 1.
    """
    states = [embedded(config, weights, np.array([ids], np.int32)) for ids in rows]
    blocks = BlockLoader(config, weights)
    for i in range(len(config.layers)):
        block = blocks.load(i)
        for x in states:
            run_block(block, x)
    scale = 1 + weights["final_norm"].astype(np.float32)
    vectors = []
    for x in states:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        vector = (x / np.sqrt(mean_square + np.float32(config.norm_epsilon)) * scale).mean(axis=1)
        for matrix in projections:
            vector = vector @ matrix
        vectors.append(vector[0] / max(float(np.linalg.norm(vector)), 1e-12))
    return np.stack(vectors).astype(np.float32)
