"""Batches of rows, as `fit` and `evaluate` take them."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from gemma_keras.train.examples import Example
from gemma_keras.train.packing import pack


class RowBatches(keras.utils.PyDataset):
    """Batches of one shape. What is missing in the last is padding, which does not count.

    Through all passes a batch has one number: Keras's epochs may be shorter than a pass.

    A batch is `({"token_ids", "padding_mask"}, targets, weights)`, `(batch_size, length)` each:
    int32, int32, int32 and float32. What examples have beside their tokens makes a dictionary of
    the targets. The mask is as `GemmaBackbone` takes it. A weight is 0 where a token does not
    count. Else it is 1, or what makes the mean gradient of accumulated batches that of all their
    tokens, or pairs.

    Args:
        examples: at least one.
        length: of a row, in tokens; no example has more inputs.
        batch_size: rows.
        packed: whether a row may hold several examples.
        seed: of the order, which differs from pass to pass; `None` keeps the order.
        accumulated: batches whose gradients an optimizer adds up before a step.
        first: number of the first batch, of those that are added up.
        pad: the id of padding.
        endless: whether pass follows pass; else there is one.
        filled: whether the last batch of a pass has as many rows as the others.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        batch_size: int,
        packed: bool = False,
        seed: int | None = None,
        accumulated: int = 1,
        first: int = 0,
        pad: int = 0,
        endless: bool = False,
        filled: bool = True,
    ) -> None:
        super().__init__()
        self._examples, self._length = examples, length
        sizes = [example.inputs for example in examples]
        self._rows = pack(sizes, length) if packed else [[i] for i in range(len(examples))]
        self._counts = [sum(_counted(examples[i]) for i in row) for row in self._rows]
        self._batch_size = min(batch_size, len(self._rows))
        self._seed, self._pad = seed, pad
        self._endless, self._filled = endless, filled
        self._accumulated, self._first = accumulated, first
        self._begin = 0
        self._orders: dict[int, np.ndarray] = {}

    @property
    def examples(self) -> Sequence[Example]:
        """All of them, in the order in which they were given."""
        return self._examples

    @property
    def filled(self) -> bool:
        """Whether the last batch of a pass has as many rows as the others."""
        return self._filled

    @property
    def rows(self) -> int:
        """How many there are; as many as examples, or fewer where these are packed."""
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of a batch, and tokens of a row."""
        return self._batch_size, self._length

    @property
    def of_a_pass(self) -> int:
        """Batches in which each row is once."""
        return -(-len(self._rows) // self._batch_size)

    @property
    def num_batches(self) -> int | None:
        return None if self._endless else self.of_a_pass

    def begin(self, number: int, seed: int | None, first: int) -> None:
        """Give the batches from a number on, of another order of rows."""
        self._begin, self._seed, self._first = number, seed, first
        self._orders.clear()

    def __getitem__(self, index: int):
        index += self._begin
        numbers = self._row_numbers(index)
        shape = self._batch_size if self._filled else len(numbers), self._length
        ids, mask = np.full(shape, self._pad, np.int32), np.zeros(shape, np.int32)
        targets, weights = np.full(shape, self._pad, np.int32), np.zeros(shape, np.float32)
        beside = {
            name: np.zeros((*shape, *array.shape[1:]), array.dtype)
            for name, array in self._examples[0].beside().items()
        }
        for row, number in enumerate(numbers):
            first = 0
            for example in (self._examples[i] for i in self._rows[number]):
                more = example.beside()
                for text in example.texts:
                    part = slice(first, first + text.stop - text.start - 1)
                    given, learnt = (
                        slice(text.start, text.stop - 1),
                        slice(text.start + 1, text.stop),
                    )
                    ids[row, part], targets[row, part] = example.ids[given], example.ids[learnt]
                    mask[row, part] = 1 + first
                    weights[row, part] = example.counts[learnt]
                    for name, array in more.items():
                        beside[name][row, part] = array[learnt]
                    first = part.stop
        if self._accumulated > 1:
            weights *= self._scale(index)
        learnt = {"targets": targets, **beside} if beside else targets
        return {"token_ids": ids, "padding_mask": mask}, learnt, weights

    def _row_numbers(self, number: int) -> np.ndarray:
        """The rows of a batch."""
        passed, index = divmod(number, self.of_a_pass)
        if passed not in self._orders:
            order = np.arange(len(self._rows))
            if self._seed is not None:
                np.random.default_rng([self._seed, passed]).shuffle(order)
            near = {p: o for p, o in self._orders.items() if abs(p - passed) <= self._accumulated}
            self._orders = near | {passed: order}
        return self._orders[passed][index * self._batch_size : (index + 1) * self._batch_size]

    def _scale(self, number: int) -> float:
        """How much a batch's mean counts among those that are added up with it: its share of their
        tokens, times their number."""
        begin = (number + self._first) // self._accumulated * self._accumulated - self._first
        # batches before the first were of another call; they are taken to be like this one
        counts = [self._counted(n) for n in range(max(begin, 0), begin + self._accumulated)]
        return self._counted(number) * len(counts) / max(sum(counts), 1)

    def _counted(self, number: int) -> int:
        """Tokens that count in a batch, or pairs."""
        return sum(self._counts[row] for row in self._row_numbers(number))


def _counted(example: Example) -> int:
    """What an example adds to the number that a mean is over: its tokens; a pair is one."""
    return int(example.counts[1:].sum()) if len(example.begins) == 1 else 1
