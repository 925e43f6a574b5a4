"""The engine of embedders: token ids become vectors. It knows no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.bundle.manifest import TensorSpec
from edge_demo.bundle.reader import Bundle
from edge_demo.engine import embedder_memory, sessions
from edge_demo.errors import EdgeError, RequestError, TooLittleMemoryError
from edge_demo.units import megabytes

_VECTOR = "sentence_embedding"
_MOST_PADDING = 1.25  # lengths of texts that are run together differ by no more than this
_ROUNDED = 8  # and a few tokens


class Embedder:
    """Runs the graph of a bundle that embeds texts.

    Texts of similar length are run together, so that the weights are read once for all of them.
    What a text is run with changes its vector by no more than rounding.

    Args:
        bundle: opened; its files are checked against their hashes here.
        threads: for one operator; `None` lets onnxruntime take the physical cores.
        force: whether to run what seems not to fit into memory.

    Raises:
        BundleError: a file has changed, or the graph does not keep its contract.
        EdgeError: there is not enough memory.
        RequestError: `threads` is out of range, or the bundle generates text.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, force: bool = False) -> None:
        self.bundle = bundle
        self.spec = bundle.require_embedder()
        sessions.check_threads(threads)
        bundle.verify()
        needed, short = embedder_memory.fitting(bundle)
        if short is not None and not force:
            raise TooLittleMemoryError(
                f"{bundle.name} ({bundle.recipe}) needs about "
                f"{megabytes(getattr(needed, short.counts))} of memory, but only "
                f"{megabytes(short.free)} is available {short.bound}; close other programs, export "
                "with fewer bits, or try it anyway with --force"
            )
        self._at_once = needed.chunk
        self._force = force
        self._table = EmbeddingTable(bundle.path / bundle.weights, bundle.embedding)
        inputs = (
            TensorSpec(
                "inputs_embeds",
                "float32",
                ("batch_size", "sequence_length", bundle.embedding.width),
            ),
            TensorSpec("attention_mask", "int64", ("batch_size", "sequence_length")),
        )
        outputs = (TensorSpec(_VECTOR, "float32", ("batch_size", self.spec.dimensions)),)
        self._session = sessions.open_session(bundle, bundle.engine, outputs, threads).run
        sessions.check_contract(self._session, bundle.engine, inputs, outputs)

    @property
    def longest(self) -> int:
        """The most tokens of a text."""
        return self.bundle.context_length

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse texts that cannot be run.

        Raises:
            RequestError: one has no tokens or too many, or an id is outside the vocabulary.
            TooLittleMemoryError: there is not enough memory for the longest.
        """
        most, size = 0, self.bundle.vocabulary_size
        for number, ids in enumerate(rows, start=1):
            if not 1 <= len(ids) <= self.longest:
                raise RequestError(
                    f"text {number:,} of {len(rows):,} has {len(ids):,} tokens; it must have 1 to "
                    f"{self.longest:,}"
                )
            if not 0 <= min(ids) <= max(ids) < size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise RequestError(f"token id {wrong} is outside the vocabulary of {size:,}")
            most = max(most, len(ids))
        if most > self._at_once and not self._force:
            embedder_memory.check_text(self.bundle, most)

    def vectors(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The vectors of texts.

        Args:
            rows: token ids of each text, as `check` allows them.

        Returns:
            float32 `(len(rows), dimensions)`, each of length 1.

        Raises:
            RequestError, EdgeError: as `check`; or onnxruntime could not run it.
        """
        self.check(rows)
        found = np.empty((len(rows), self.spec.dimensions), np.float32)
        for members, vectors in self.in_steps(rows):
            found[members] = vectors
        return found

    def in_steps(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        """As `vectors`, one batch after another; the rows must have been checked.

        Yields:
            Indices of some texts, and their vectors, float32 `(len(indices), dimensions)`.

        Raises:
            EdgeError: onnxruntime could not run it, or a number is not finite.
        """
        for members in batches([len(ids) for ids in rows], self._at_once):
            yield members, self._run([rows[i] for i in members])

    def _run(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        length = max(map(len, rows))
        embeds = np.zeros((len(rows), length, self._table.width), np.float32)
        mask = np.zeros((len(rows), length), np.int64)
        for row, ids in enumerate(rows):
            embeds[row, : len(ids)] = self._table.rows(ids)
            mask[row, : len(ids)] = 1
        try:
            given: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
            vectors = np.asarray(self._session.run([_VECTOR], given)[0])
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise EdgeError(f"onnxruntime could not run the model: {error}") from error
        if not np.isfinite(vectors).all():
            raise EdgeError(
                f"{self.bundle.name} returned numbers that are not finite; its weights are damaged "
                "or do not suit this recipe"
            )
        return vectors


def batches(lengths: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Indices of texts that are run together, short ones first.

    Args:
        lengths: of the texts, in tokens.
        at_once: the most tokens of a batch, padding included; a longer text is run by itself.
    """
    members: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if members:
            longer = lengths[i] > lengths[members[0]] * _MOST_PADDING + _ROUNDED
            if longer or (len(members) + 1) * lengths[i] > at_once:
                yield members
                members = []
        members.append(i)
    if members:
        yield members
