"""What a teacher says of each token of some rows, on disk: its likeliest tokens and their
log-probabilities.

The teacher is a Keras model, or a bundle that onnxruntime runs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from gemma_keras.checkpoints.unfinished import unfinished
from gemma_keras.errors import CheckpointError
from gemma_keras.train.arrays import DAMAGED, opened_arrays
from gemma_keras.train.errors import RowError
from gemma_keras.train.examples import Example
from gemma_keras.train.fit import read_examples
from gemma_keras.train.logits import log_mass, logits_of_keras
from gemma_keras.train.tuner import check_is_task, is_number

TOKENS, LOG_PROBABILITIES = "likeliest_tokens", "log_probabilities"
_ABOUT, _INDEX = "targets.json", "index.npz"
_ARRAYS = {TOKENS: np.int32, LOG_PROBABILITIES: np.float16}
_WIDE = {TOKENS: np.int32, LOG_PROBABILITIES: np.float32}  # in a batch


class Teacher(Protocol):
    """What can teach: `edge_demo.engine.runner.Engine` is one."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...

    def all_logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Add tokens; yields float32 `(chunk, vocabulary_size)`, the logits after each."""
        ...


@dataclasses.dataclass(frozen=True)
class TeacherTargets:
    """The likeliest tokens of the teacher wherever a token of some examples is to be predicted.

    Attributes:
        temperature: of the distributions.
        tokenizer: digest of the tokenizer that the examples were made with.
        vocabulary_size: of the student and of the teacher.
        arrays: `TOKENS` and `LOG_PROBABILITIES`, `(positions, top)` each.
        begins: for each example's digest the first of its positions.
    """

    path: Path
    temperature: float
    tokenizer: str
    vocabulary_size: int
    arrays: dict[str, np.ndarray]
    begins: dict[bytes, int]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TeacherTargets:
        """Read a folder of `write_targets`; the arrays stay on disk.

        Raises:
            CheckpointError: it is none, or is damaged.
        """
        folder = Path(path)
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            with opened_arrays(folder / _INDEX) as index:
                digests, begins = index["digests"], index["begins"]
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _ARRAYS
            }
            shapes = {array.shape for array in arrays.values()}
            if shapes != {(int(begins[-1]), about["top"])} or len(digests) + 1 != len(begins):
                raise ValueError("sizes differ")
            if begins[0] != 0 or (np.diff(begins) < 0).any():
                raise ValueError("examples are not in order")
            named = dict(zip(map(bytes, digests), begins.tolist(), strict=False))
            heat, pieces = float(about["temperature"]), int(about["vocabulary_size"])
            return cls(folder, heat, about["tokenizer"], pieces, arrays, named)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{folder} holds no targets of a teacher; write_targets writes them"
            ) from error
        except OSError as error:
            raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error
        except DAMAGED as error:
            raise CheckpointError(f"the targets in {folder} are damaged: {error}") from error

    @property
    def identity(self) -> list[Any]:
        """What tells these targets from others: their number, and a few of them."""
        array = self.arrays[LOG_PROBABILITIES]
        few = array[:: -(-len(array) // 256)]
        return [array.shape, self.temperature, hashlib.sha256(few.tobytes()).hexdigest()]

    def check_tokenizer(self, student) -> None:
        """Raise `ValueError` for a student with another tokenizer."""
        if _digest_of_tokenizer(student) != self.tokenizer:
            raise ValueError(f"the targets in {self.path} were written with another tokenizer")
        if student.backbone.config.vocabulary_size != self.vocabulary_size:
            raise ValueError(f"the targets in {self.path} were written for another vocabulary")

    def put_beside(self, example: Example) -> Example:
        """The example with the teacher's distribution of each of its tokens.

        Raises:
            RowError: it was not among those that the targets were written for.
        """
        begin = self.begins.get(example.digest)
        if begin is None:
            raise RowError(
                f"a row is not among those of {self.path}; write the targets for the same rows, "
                "with the same template and sequence_length"
            )
        return dataclasses.replace(
            example, beside=functools.partial(self._values, example.counts, begin)
        )

    def _values(self, counts: np.ndarray, begin: int) -> dict[str, np.ndarray]:
        """The arrays of an example, read from disk; zeros where nothing is to be predicted."""
        where = np.flatnonzero(counts[1:]) + 1
        found = {}
        for name, array in self.arrays.items():
            wide = np.zeros((len(counts), array.shape[1]), _WIDE[name])
            wide[where] = array[begin : begin + len(where)]
            found[name] = wide
        if not 0 <= found[TOKENS].min() <= found[TOKENS].max() < self.vocabulary_size:
            raise CheckpointError(f"the targets in {self.path} are damaged: they name no token")
        return found


def write_targets(
    path: str | os.PathLike[str],
    teacher: Any,
    student,
    rows: Any,
    top: int = 256,
    temperature: float = 1.0,
    on_too_long: str = "truncate",
    overwrite: bool = False,
    verbose: int = 1,
) -> TeacherTargets:
    """Ask a teacher once for its distribution of each token that a student is to learn.

    Args:
        path: of the folder to write, which appears when it is complete. A position takes six bytes
            for each of `top` tokens.
        teacher: a `GemmaCausalLM`, the folder of a bundle, or a `Teacher`.
        student: the `GemmaCausalLM` that will learn: it writes rows as tokens.
        rows: as for `fit`.
        top: how many of the likeliest tokens are kept; the others become one outcome.
        temperature: of the distributions.
        on_too_long: as for `fit`.
        overwrite: whether a folder of targets may be replaced.
        verbose: 0 shows no progress.

    Raises:
        RowError, OSError: as `fit`.
        ValueError: an argument is out of range, or the teacher has another vocabulary or tokenizer.
        CheckpointError: the folder exists or cannot be written.
        EdgeError: the bundle cannot be run.
    """
    check_is_task(student, "the student")
    size = student.backbone.config.vocabulary_size
    if not is_number(top) or top != int(top) or not 1 <= top < size:
        raise ValueError(f"top is {top!r}; it must be 1 to {size - 1:,}")
    top = int(top)
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}; it must be more than 0")
    examples = read_examples(student, rows, on_too_long).examples
    examples = list({example.digest: example for example in examples}.values())
    digests = [example.digest for example in examples]
    counts = [int(example.counts[1:].sum()) for example in examples]
    begins = np.cumsum([0, *counts])
    about = {
        "top": top,
        "temperature": float(temperature),
        "tokenizer": _digest_of_tokenizer(student),
        "vocabulary_size": size,
    }
    asked = _logits_of(teacher, student)
    shape = int(begins[-1]), top
    num_bytes = shape[0] * top * sum(np.dtype(kind).itemsize for kind in _ARRAYS.values())
    if verbose:
        print(f"{len(examples):,} examples; {num_bytes / 1e6:,.0f} MB for {shape[0]:,} tokens")
    with unfinished(
        Path(path), "folder", num_bytes, overwrite=overwrite, is_replaceable=_is_targets
    ) as partial:
        arrays = {
            name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", kind, shape)
            for name, kind in _ARRAYS.items()
        }
        progress = keras.utils.Progbar(len(examples), verbose=verbose, unit_name="example")
        for number, example in enumerate(examples):
            first = int(begins[number])
            for logits in asked(example):
                _check(logits, size)
                ids, log_p = likeliest(logits, top, temperature)
                part = slice(first, first + len(ids))
                arrays[TOKENS][part], arrays[LOG_PROBABILITIES][part] = ids, log_p
                first = part.stop
            progress.update(number + 1)
        for array in arrays.values():
            array.flush()
        np.savez(
            partial / _INDEX,
            digests=np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1),
            begins=begins,
        )
        (partial / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return TeacherTargets.open(path)


def likeliest(logits: np.ndarray, top: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens, and their log-probabilities among all.

    Args:
        logits: float32 `(positions, vocabulary_size)`.
        top: how many.
        temperature: of the distributions.

    Returns:
        int64 and float64 `(positions, top)`, unordered.
    """
    ids = np.argpartition(logits, -top, axis=-1)[:, -top:]
    chosen = np.take_along_axis(logits, ids, axis=-1).astype(np.float64) / temperature
    return ids, chosen - log_mass(logits, temperature)[:, None]


def _check(logits: np.ndarray, size: int) -> None:
    if logits.shape[-1] != size:
        raise ValueError(
            f"the teacher has a vocabulary of {logits.shape[-1]:,}, and the student of {size:,}"
        )
    if not np.isfinite(logits).all():
        raise ValueError("the teacher's logits are not finite")


def _logits_of(teacher: Any, student) -> Callable[[Example], Iterator[np.ndarray]]:
    """A function that makes a teacher's logits wherever a token of an example is to be
    predicted, in chunks."""
    if isinstance(teacher, keras.Model):
        check_teacher(teacher, student)
        return lambda example: logits_of_keras(teacher, example)
    if isinstance(teacher, (str, os.PathLike)):
        teacher = _open_bundle(teacher, student)
    if not hasattr(teacher, "all_logits"):
        raise ValueError(
            "the teacher must be a GemmaCausalLM, the folder of a bundle, or an engine, not "
            f"{type(teacher).__name__}"
        )

    def logits(example: Example) -> Iterator[np.ndarray]:
        teacher.rewind(0)
        first = 1
        for chunk in teacher.all_logits(example.ids[:-1].tolist()):
            counted = example.counts[first : first + len(chunk)]
            if counted.any():
                yield chunk[counted]
            first += len(chunk)

    return logits


def check_teacher(teacher: Any, student) -> None:
    """Raise `ValueError` for a Keras model whose distributions are over other tokens."""
    check_is_task(teacher, "the teacher")
    sizes = [one.backbone.config.vocabulary_size for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has a vocabulary of {sizes[0]:,} and the teacher of {sizes[1]:,}; their "
            "distributions are over different tokens"
        )
    protos = [one.preprocessor and one.preprocessor.tokenizer.proto for one in (student, teacher)]
    if None not in protos and protos[0] != protos[1]:
        raise ValueError("the student and the teacher have different tokenizers")


def _open_bundle(path: str | os.PathLike[str], student) -> Teacher:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.engine.runner import Engine

    bundle = Bundle.open(path)
    proto = student.preprocessor.tokenizer.proto
    if (bundle.path / bundle.tokenizer.file).read_bytes() != proto:
        raise ValueError(f"the bundle {path} has another tokenizer than the student")
    return Engine(bundle)


def _digest_of_tokenizer(student) -> str:
    return hashlib.sha256(student.preprocessor.tokenizer.proto).hexdigest()


def _is_targets(path: Path) -> bool:
    return {one.name for one in path.iterdir()} <= {_ABOUT, _INDEX, *(f"{n}.npy" for n in _ARRAYS)}
