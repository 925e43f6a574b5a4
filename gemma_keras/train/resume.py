"""Trainings that go on where they were interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma_keras.errors import CheckpointError
from gemma_keras.train import training_state
from gemma_keras.train.examples import Example
from gemma_keras.train.training_state import Place

_SAMPLE = 4096  # numbers of a weight that tell it from another


class Resumes(keras.callbacks.Callback):
    """Writes the state of a training every few batches, and begins where a former one ended.

    Keras knows the beginnings of epochs only. So an epoch that is resumed in its middle begins
    anew, and learns nothing from the batches that had been learnt from.

    Args:
        folder: of the files.
        every: batches from one file to the next; one is written when an epoch ends, too.
        place: where the training is.
        path: of the file that it begins with, if there is one.
        say: prints a line.

    Attributes:
        place: where the training is now.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        place: Place,
        path: Path | None,
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._folder, self._every, self._say = folder, every, say
        self.place, self._path = place, path
        self._written = None if path is None else place.step
        self._shown: dict[str, np.ndarray] = {}
        self._skip = place.step % place.steps_per_epoch
        self._own: Any = None  # the train function, while batches are skipped
        self._rate: float | None = None
        self._is_finite = True

    @property
    def initial_epoch(self) -> int:
        """The epoch that is begun, counted from 0."""
        return self.place.step // self.place.steps_per_epoch

    @property
    def first_batch(self) -> int:
        """The number of its first batch."""
        return self.place.step - self._skip

    def restore(self, model: keras.Model, epochs: int) -> None:
        """Give the model the state of the file, if there is one.

        Raises:
            CheckpointError: it cannot be read, or is of another model.
        """
        if self._path is None:
            return
        given = _rate_of(model)
        self._shown = training_state.restore(self._path, model)
        self._rate = _rate_of(model)
        if self.initial_epoch >= epochs:
            self._say(f"nothing is left to do: {self._path} is of the end of epoch {epochs:,}")
        else:
            at = f"epoch {self.initial_epoch + 1}, batch {self._skip + 1:,}"
            self._say(f"going on from {self._path}: {at} of {self.place.steps_per_epoch:,}")
        if given != self._rate:
            self._say(f"the learning rate is that of the checkpoint, {self._rate:g}")

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if not self._skip:
            return
        model = self.model
        variables = training_state.variables_of(model)
        for name, array in self._shown.items():
            if name in variables and tuple(variables[name].shape) == array.shape:
                variables[name].assign(array)
        if self._rate is not None:  # a schedule by epochs has been applied to it already
            _optimizer_of(model).learning_rate = self._rate
        self._own = model.train_function
        model.train_function = _skipping(model, self._skip)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        if batch < self._skip:
            return
        self._skip = 0
        per_epoch = self.place.steps_per_epoch
        step = self.place.step // per_epoch * per_epoch + batch + 1
        before = self.place.step
        self.place = dataclasses.replace(self.place, step=step)
        loss = (logs or {}).get("loss")
        self._is_finite = self._is_finite and (loss is None or math.isfinite(float(loss)))
        if step // self._every > before // self._every:
            self.save()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save before Keras puts averaged weights, or the best ones, in the place of the last."""
        self.save()

    def save(self) -> None:
        """Write a file, if there is none of this place and no loss was infinite or NaN.

        Raises:
            CheckpointError: it cannot be written; those before are whole.
        """
        if self._written != self.place.step and self._is_finite:
            self._path = training_state.write(self._folder, self.model, self.place)
            self._written = self.place.step

    @contextlib.contextmanager
    def said_where(self) -> Iterator[None]:
        """Says where a training can go on, if Ctrl-C or an error ends it in this context."""
        try:
            yield
        except BaseException:
            if self._path is None:
                self._say("\nthe training ended before its first checkpoint")
            else:
                self._say(
                    f"\nthe training ended early; its last checkpoint is {self._path}, from which "
                    "the same call of fit goes on"
                )
            raise
        finally:
            if self._own is not None:
                self.model.train_function = self._own


def _optimizer_of(model: keras.Model) -> Any:
    """The one that has the learning rate."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def _rate_of(model: keras.Model) -> float | None:
    """The learning rate, if it is a number that may be set."""
    rate = _optimizer_of(model)._learning_rate
    return float(ops.convert_to_numpy(rate)) if isinstance(rate, keras.Variable) else None


def _skipping(model: keras.Model, count: int) -> Callable[..., Any]:
    """A train function that learns nothing from the first batches, and then is the model's own."""
    own, seen = model.train_function, 0
    logs = {metric.name: metric.result() for metric in model._token_metrics}

    def skip(*arguments):
        nonlocal seen
        seen += model.steps_per_execution
        if isinstance(arguments[-1], Iterator):  # PyTorch's trainer gives the batches themselves
            for _ in range(model.steps_per_execution):
                next(arguments[-1])
        if seen >= count:
            model.train_function = own
        return (logs, arguments[0]) if keras.config.backend() == "jax" else logs

    return skip


def resuming(
    model: keras.Model,
    folder: Path,
    every: int,
    place: Place,
    say: Callable[[str], None] = lambda line: None,
) -> Resumes:
    """The callback of a training that begins, or goes on where its folder says.

    Args:
        model: compiled.
        folder: of the files; it is there.
        every: batches from one file to the next.
        place: its beginning; the folder's counts. A digest of the weights that stay as they are is
            added.
        say: prints a line.

    Raises:
        CheckpointError: the folder cannot be read, has no space, or is of another training.
    """
    training_state.check_room(folder, model)
    learns = {name: _digest(repr(value)) for name, value in model._learns().items()}
    of = {**place.of, **learns, "another base model": _digest_of_frozen(model)}
    place = dataclasses.replace(place, of=of)
    files = training_state.files_of(folder)
    if not files:
        return Resumes(folder, every, place, None, say)
    there = training_state.read_place(files[-1])
    other = [name for name, digest in of.items() if there.of.get(name) != digest]
    if there.steps_per_epoch != place.steps_per_epoch:
        other.append(f"{there.steps_per_epoch:,} batches an epoch")
    if other:
        raise CheckpointError(
            f"{files[-1]} is of a training with {' and '.join(other)}; give what it was begun "
            "with, or another folder"
        )
    return Resumes(folder, every, there, files[-1], say)


def digest_of_examples(examples: Sequence[Example]) -> str:
    """What tells examples from others."""
    digests = b"".join(example.digest for example in examples)
    return hashlib.blake2b(digests, digest_size=16).hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_of_frozen(model: keras.Model) -> str:
    """What tells the weights that are not trained from others: their shapes, and a few numbers of
    each."""
    found = hashlib.blake2b(digest_size=16)
    trained = {id(variable) for variable in model.trainable_variables}
    for variable in model.weights:
        if id(variable) in trained:
            continue
        shape = tuple(variable.shape)
        found.update(f"{shape} {variable.dtype}".encode())
        few = ops.reshape(variable.value, (-1,))[:: -(-int(np.prod(shape)) // _SAMPLE)]
        found.update(ops.convert_to_numpy(ops.cast(few, "float32")).tobytes())
    return found.hexdigest()
