"""What `GemmaCausalLM.fit` and `evaluate` do with rows."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from gemma_keras.model.losses import TokenLoss
from gemma_keras.model.training import fit_prepared
from gemma_keras.train.batches import RowBatches
from gemma_keras.train.errors import RowError
from gemma_keras.train.examples import Example, Examples, Renderer, make_examples
from gemma_keras.train.memory import check_fits
from gemma_keras.train.processes import (
    fed,
    leave_printing_to_the_first,
    of_the_first,
    refuse_if_several,
)
from gemma_keras.train.resume import digest_of_examples, resuming
from gemma_keras.train.rows import has_length, peeked, read_rows
from gemma_keras.train.training_state import Place, only_training_in

_BATCH_SIZE = 32  # Keras's
_ROUND = 16  # lengths are multiples of it: fewer shapes to compile


def fit(
    model,
    plain: Callable[..., Any],
    x: Any,
    batch_size: int | None,
    validation_data: Any,
    validation_split: float | None,
    pack: bool,
    on_too_long: str,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    **options: Any,
):
    """Teach a `GemmaCausalLM` rows, or leave what is none to `plain`; arguments as of its `fit`."""
    validation_data = _without_nothing(validation_data)
    rows, x = peeked(x)
    if not rows:
        _refuse_without_rows(pack, on_too_long, validation_data, checkpoint_dir)
        return plain(
            x,
            batch_size=batch_size,
            validation_data=validation_data,
            validation_split=validation_split,
            **options,
        )
    _refuse_beside_rows(x, options)
    _check_options(model, batch_size, validation_split, pack)
    if checkpoint_dir is not None:
        _check_checkpoints(checkpoint_dir, checkpoint_every, options.get("initial_epoch"))
    leave_printing_to_the_first(options)
    show = bool(options.get("verbose", "auto"))
    steps, most = options.get("steps_per_epoch"), None
    if steps is not None and not has_length(x):
        most = steps * options.get("epochs", 1) * (batch_size or _BATCH_SIZE)
    found = read_examples(model, x, on_too_long, most, show)
    examples, held_out = found.examples, 0
    if validation_data is not None:
        rows, validation_data = peeked(validation_data)
        if rows or _holds_strings(validation_data):
            _refuse_tuple("validation_data", validation_data)
            size = options.pop("validation_batch_size", None) or batch_size
            validation_data = _to_measure(
                model, validation_data, size, pack, on_too_long, show, "validation_data: "
            )
    elif validation_split:
        held_out = round(len(examples) * validation_split)
        if not 0 < held_out < len(examples):
            raise ValueError(
                f"validation_split={validation_split} of {len(examples):,} examples leaves nothing "
                "on one side"
            )
        validation_data = _batches(model, examples[-held_out:], batch_size, pack)
        examples = examples[:-held_out]
    accumulated = 1
    if isinstance(model.loss, TokenLoss):  # another loss does not count tokens
        accumulated = getattr(model.optimizer, "gradient_accumulation_steps", None) or 1
    shuffle = bool(options.pop("shuffle", True))
    seed = of_the_first(np.random.randint(1 << 31) if shuffle else None)
    first = int(model.optimizer._iterations.value) % accumulated if accumulated > 1 else 0
    batches = _batches(
        model,
        examples,
        batch_size,
        pack,
        seed=seed,
        endless=True,
        accumulated=accumulated,
        first=first,
    )
    if show:
        held = f"; the last {held_out:,} examples are held out" if held_out else ""
        packed = f"; packed into {batches.rows:,} rows" if pack else ""
        print(f"{found}{held}{packed}", flush=True)
    memory = check_fits(model, *batches.shape)
    if show and memory:
        print(memory, flush=True)
    options["steps_per_epoch"] = steps = steps or batches.of_a_pass
    options["validation_data"] = fed(validation_data)
    if checkpoint_dir is None:
        return fit_prepared(model, fed(batches), **options)
    if steps % model.steps_per_execution:
        raise ValueError(
            f"an epoch has {steps:,} batches, which steps_per_execution="
            f"{model.steps_per_execution} does not divide; with checkpoint_dir it must"
        )
    say: Any = functools.partial(print, flush=True) if show else lambda line: None
    of = {
        "other rows": digest_of_examples(examples),
        "other options": repr((pack, batch_size, shuffle)),
    }
    folder = Path(checkpoint_dir).expanduser()
    place = Place(0, steps, seed, first, of)
    callbacks = keras.tree.flatten([options.pop("callbacks", None)])
    with only_training_in(folder):
        resumes = resuming(model, folder, checkpoint_every, place, say)
        resumes.restore(model, options.get("epochs", 1))
        place = resumes.place
        batches.begin(resumes.first_batch, place.seed, place.first)
        with resumes.said_where():
            return fit_prepared(
                model,
                batches,
                callbacks=[*callbacks, resumes],
                initial_epoch=resumes.initial_epoch,
                **options,
            )


def evaluate(
    model,
    plain: Callable[..., Any],
    prepared: Callable[..., Any],
    x: Any,
    batch_size: int | None,
    pack: bool,
    on_too_long: str,
    **options: Any,
):
    """Measure a `GemmaCausalLM` on rows, or leave what is none to `plain`; arguments as of its
    `evaluate`. `prepared` takes batches."""
    rows, x = peeked(x)
    if not rows:
        _refuse_without_rows(pack, on_too_long)
        return plain(x, batch_size=batch_size, **options)
    _refuse_beside_rows(x, options)
    _check_options(model, batch_size, None, pack)
    leave_printing_to_the_first(options)
    show = bool(options.get("verbose", "auto"))
    batches = _to_measure(model, x, batch_size, pack, on_too_long, show)
    return prepared(fed(batches), **options)


def read_examples(
    model,
    source: Any,
    on_too_long: str = "truncate",
    most: int | None = None,
    show: bool = False,
) -> Examples:
    """What a model is to learn from rows.

    Args:
        model: a `GemmaCausalLM` with a preprocessor.
        source: as `gemma_keras.train.rows.read_rows` takes it.
        on_too_long: as of `gemma_keras.train.examples.make_examples`.
        most: rows that are read; by default all.
        show: whether progress may be printed.

    Raises:
        RowError, ValueError, OSError: as these.
    """
    preprocessor = model.preprocessor
    tokenizer = preprocessor.tokenizer
    render = Renderer(
        tokenizer.proto,
        model.turns,
        lambda text: tokenizer.encode(preprocessor.without_bos(text)),
        starts=bool(preprocessor.add_start_token),
        ends=bool(preprocessor.add_end_token),
        pairs=model._learns_pairs,
    )
    # The last token of an example is a target, and no input.
    length = preprocessor.sequence_length + 1
    found = make_examples(read_rows(source, most), render, length, on_too_long)
    return dataclasses.replace(found, examples=model._with_targets(found.examples, show))


def _to_measure(
    model, source, batch_size, packed: bool, on_too_long: str, show: bool, where: str = ""
) -> RowBatches:
    """Batches of rows to measure the model on; says what was cut or skipped."""
    try:
        found = read_examples(model, source, on_too_long, show=show)
    except RowError as error:
        raise RowError(f"{where}{error}") from None
    if show and (found.truncated or found.skipped):
        print(f"{where}{found}", flush=True)
    return _batches(model, found.examples, batch_size, packed)


def _without_nothing(data: Any) -> Any:
    """What `(rows,)`, `(rows, None)` and the like hold."""
    if isinstance(data, tuple) and data and all(one is None for one in data[1:]):
        return data if isinstance(data[0], str) else data[0]
    return data


def _holds_strings(source: Any) -> bool:
    """Whether it is a `tf.data.Dataset` of texts, which alone may stay a stream."""
    dtype = getattr(getattr(source, "element_spec", None), "dtype", None)
    return getattr(dtype, "name", None) == "string"


def _refuse_tuple(name: str, data: Any) -> None:
    if isinstance(data, tuple) and len(data) > 1 and not isinstance(data[0], (str, Mapping)):
        raise ValueError(
            f"{name} is a tuple, which Keras takes as inputs and targets; give prompts and answers "
            "as {'prompts': [...], 'responses': [...]}"
        )


def _refuse_beside_rows(x: Any, options: dict[str, Any]) -> None:
    for name in ("y", "sample_weight", "class_weight"):
        if options.pop(name, None) is not None:
            raise ValueError(
                f"{name} is for arrays, and x holds rows, which say themselves what is learnt"
            )
    _refuse_tuple("x", x)


def _check_options(model, batch_size: Any, validation_split: Any, pack: bool) -> None:
    if pack and model._learns_pairs:
        raise ValueError("pairs of answers cannot be packed; leave pack out")
    if model.preprocessor is None:
        raise ValueError("x holds rows, but the model has no preprocessor to read them")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; it must be a positive integer")
    split = validation_split
    if split is not None and not (isinstance(split, (int, float)) and 0 <= split < 1):
        raise ValueError(f"validation_split is {split!r}; it must be at least 0 and less than 1")


def _check_checkpoints(folder: Any, every: Any, initial_epoch: int | None) -> None:
    refuse_if_several("checkpoint_dir")
    if initial_epoch:
        raise ValueError("initial_epoch is what checkpoint_dir says; leave it out")
    if not isinstance(every, numbers.Integral) or every < 1:
        raise ValueError(f"checkpoint_every is {every!r}; it must be a positive integer")
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise ValueError(f"checkpoint_dir is {folder!r}; it must be the path of a folder")


def _refuse_without_rows(
    pack: bool, on_too_long: str, validation_data: Any = None, checkpoint_dir: Any = None
) -> None:
    given = {
        "pack": pack,
        "on_too_long": on_too_long != "truncate",
        "checkpoint_dir": checkpoint_dir is not None,
    }
    for name in given:
        if given[name]:
            raise ValueError(f"{name} is for rows, but x holds none")
    if validation_data is not None and _holds_rows(validation_data):
        raise ValueError("validation_data holds rows, and x does not; give both in one form")


def _holds_rows(data: Any) -> bool:
    """Whether it holds rows; an iterator is not looked into."""
    return not isinstance(data, Iterator) and peeked(data)[0]


def _batches(model, examples: Sequence[Example], batch_size, packed: bool, **options) -> RowBatches:
    most = model.preprocessor.sequence_length
    longest = max(example.inputs for example in examples)
    length = most if packed else min(max(most, longest), -(-longest // _ROUND) * _ROUND)
    pad = model.preprocessor.tokenizer.pad_token_id
    # A loss of the user's own may count what is missing.
    filled = isinstance(model.loss, TokenLoss)
    size = batch_size or _BATCH_SIZE
    return RowBatches(examples, length, size, packed, pad=pad, filled=filled, **options)
