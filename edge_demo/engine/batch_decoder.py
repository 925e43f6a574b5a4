"""Decodes several texts at once, one row each, so that the weights are read once for all.

onnxruntime's `GroupQueryAttention` accepts rows of different lengths if each adds one token. So
each prompt is run alone on an engine, and its keys and values are copied into a row. Then all rows
decode together. Each row gets the same result as alone, up to rounding: 4-bit products sum several
rows in another order than one. With 1, 2 or a multiple of 4 rows, a row's result does not depend on
its index or on the other rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_demo.engine.binding import Binding
from edge_demo.engine.candidates import Candidates
from edge_demo.engine.kv_cache import KVCache, Snapshot
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import RequestError

# Products of 4-bit weights process rows in groups of four, two and one, which round differently.
# With other numbers of rows, the last rows would get other texts than the first.
SIZES = (1, 2, 4, 8, 16, 32, 64)


def check_rows(rows: int, name: str) -> None:
    """Refuse a number of rows that would not give each row the same text.

    Args:
        rows: how many texts are decoded at once.
        name: of the option, for the message.

    Raises:
        RequestError: it is none of `SIZES`.
    """
    if rows not in SIZES:
        raise RequestError(f"{name} must be one of {', '.join(map(str, SIZES))}; found {rows:,}")


class BatchDecoder:
    """Buffers for some texts, over the session of an engine.

    Args:
        engine: whose graph and weights are run; its tokens are not changed.
        count: of the rows, at least one.

    Attributes:
        lengths: how many tokens each row holds.
    """

    def __init__(self, engine: Engine | CandidateEngine, count: int) -> None:
        bundle = engine.bundle
        self._engine = engine
        self._cache = KVCache(
            engine.graph, bundle.ropes, bundle.windows, bundle.context_length, count
        )
        self._bindings: dict[int, Binding] = {}
        self.lengths = [0] * count

    def put(self, row: int, snapshot: Snapshot) -> None:
        """Replace a row's keys and values by those of an engine of the same bundle."""
        self._reserve(len(snapshot.tokens))
        self._cache.fill(snapshot.filled, row)
        self.lengths[row] = len(snapshot.tokens)

    def move(self, source: int, target: int) -> None:
        """Replace a row's keys and values by those of another row, which is cleared."""
        self._cache.fill(self._cache.row(source, self.lengths[source]), target)
        self.lengths[target], self.lengths[source] = self.lengths[source], 0

    def filled(self, row: int) -> dict[str, np.ndarray]:
        """Returns views of a row's keys and values, as `Snapshot` has them."""
        return self._cache.row(row, self.lengths[row])

    def decode(
        self, tokens: Mapping[int, int], rows: int | None = None
    ) -> dict[int, np.ndarray | Candidates]:
        """Add one token to some rows; the other rows are cleared.

        Args:
            tokens: row to token id.
            rows: how many of the first rows are run, which are fewer instructions than all.

        Returns:
            For each of these rows the result of the engine's `decode`; the next call reuses the
            arrays.

        Raises:
            RequestError: a row is full, or an id is outside the vocabulary.
        """
        rows = len(self.lengths) if rows is None else rows
        self.lengths = [n if row in tokens else 0 for row, n in enumerate(self.lengths)]
        totals = [n + 1 for n in self.lengths[:rows]]
        if max(totals) > self._engine.context_length:
            raise RequestError(
                f"a text already fills the context of {self._engine.context_length:,}"
            )
        self._reserve(max(totals))
        if rows not in self._bindings:
            self._bindings[rows] = self._engine.bind_rows(self._cache, rows)
        binding = self._bindings[rows]
        # An unused row runs a token at position 0, whose result is ignored.
        ids = [tokens.get(row, 0) for row in range(rows)]
        binding.fill(ids, totals, [0])
        outputs = [array[:, 0] for array in binding.run()]
        for row in tokens:
            self.lengths[row] += 1
        if isinstance(self._engine, CandidateEngine):
            return {row: self._engine.candidates(outputs, row) for row in tokens}
        return {row: outputs[0][row] for row in tokens}

    def _reserve(self, tokens: int) -> None:
        used = max((row + 1 for row, length in enumerate(self.lengths) if length), default=0)
        if self._cache.reserve(tokens, used):
            self._bindings.clear()  # they are bound to buffers that are now replaced
