"""One session bound to buffers: what it reads is written there, what it writes is read there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from edge_demo.bundle.embedding import EmbeddingTable
from edge_demo.engine.sessions import Session
from edge_demo.errors import EdgeError


class Binding:
    """A session that adds `length` tokens to each of some texts and returns some rows for each.

    It shares the memory of its arrays with onnxruntime, so a run allocates and copies nothing but
    activations.

    Args:
        session: to run.
        embedding: the rows of its tokens.
        buffers: input name to keys or values, `(batch, kv_heads, capacity, head_dim)`, which are
            updated in place.
        tables: input name to rotary table.
        length: tokens added to each text.
        num_logits: rows of outputs for each text.
        batch: how many texts there are.
    """

    def __init__(
        self,
        session: Session,
        embedding: EmbeddingTable,
        buffers: Mapping[str, np.ndarray],
        tables: Mapping[str, np.ndarray],
        length: int,
        num_logits: int,
        batch: int = 1,
    ) -> None:
        self._session = session.run
        self._embedding = embedding
        self._inputs_embeds = np.zeros((batch, length, embedding.width), np.float32)
        self._seqlens_k = np.zeros(batch, np.int32)
        self._total = np.zeros((), np.int32)
        self._positions = np.zeros(num_logits, np.int64)
        self._outputs = [
            np.empty(
                (batch, num_logits, *(d for d in spec.shape if isinstance(d, int))), spec.dtype
            )
            for spec in session.outputs
        ]
        self._binding = self._session.io_binding()
        inputs: dict[str, np.ndarray] = {
            "inputs_embeds": self._inputs_embeds,
            "seqlens_k": self._seqlens_k,
            "total_sequence_length": self._total,
            "logit_positions": self._positions,
            **tables,
        }
        self._values: list[Any] = []
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._share(array))
        for name, array in buffers.items():
            value = self._share(array)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(present_name(name), value)
        for spec, array in zip(session.outputs, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(spec.name, self._share(array))

    def _share(self, array: np.ndarray) -> Any:
        # an OrtValue on the CPU shares the array's memory
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._values.append(value)
        return value

    def fill(self, ids: Sequence[int], totals: Sequence[int], positions: Sequence[int]) -> None:
        """Write what the next run reads.

        Args:
            ids: of the tokens, text after text.
            totals: how many tokens each text has after the run.
            positions: of the tokens added, those whose rows are returned.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        self._inputs_embeds[:] = self._embedding.rows(ids).reshape(self._inputs_embeds.shape)
        self._seqlens_k[:] = np.array(totals) - 1
        self._total[...] = max(totals)
        self._positions[:] = positions

    def run(self) -> list[np.ndarray]:
        """Run the session on what was filled in.

        Returns:
            Its outputs, `(batch, num_logits, ...)`; the next run writes to the same arrays.

        Raises:
            EdgeError: onnxruntime could not run it.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise EdgeError(f"onnxruntime could not run the model: {error}") from error
        return self._outputs


def present_name(past: str) -> str:
    """The output that has the keys or values of an input."""
    return past.replace("past_key_values.", "present.")
