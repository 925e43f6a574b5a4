"""What `GemmaCausalLM.fit` and `evaluate` do with rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_keras.model.training import fit_prepared
from gemma_keras.train.batches import RowBatches
from gemma_keras.train.examples import Example, Examples, Renderer, make_examples
from gemma_keras.train.rows import peeked, read_rows

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
    **options: Any,
):
    """Teach a `GemmaCausalLM` rows, or leave what is none to `plain`; arguments as of its `fit`."""
    rows, x = _are_rows(model, x)
    if not rows:
        _refuse_without_rows(model, pack, on_too_long, validation_data)
        return plain(
            x,
            batch_size=batch_size,
            validation_data=validation_data,
            validation_split=validation_split,
            **options,
        )
    _refuse_beside_rows(options)
    found = read_examples(model, x, on_too_long)
    examples, held_out = found.examples, 0
    if validation_data is not None:
        rows, validation_data = _are_rows(model, validation_data)
        if rows or _holds_strings(validation_data):
            shown = read_examples(model, validation_data, on_too_long)
            validation_data = _batches(model, shown.examples, batch_size, pack)
    elif validation_split:
        held_out = round(len(examples) * validation_split)
        if not 0 < held_out < len(examples):
            raise ValueError(
                f"validation_split={validation_split} of {len(examples):,} examples leaves nothing "
                "on one side"
            )
        validation_data = _batches(model, examples[-held_out:], batch_size, pack)
        examples = examples[:-held_out]
    accumulated = getattr(model.optimizer, "gradient_accumulation_steps", None) or 1
    batches = _batches(
        model,
        examples,
        batch_size,
        pack,
        seed=np.random.randint(1 << 31) if options.pop("shuffle", True) else None,
        accumulated=accumulated,
        first=int(model.optimizer._iterations.value) % accumulated if accumulated > 1 else 0,
    )
    if options.get("verbose", "auto"):
        held = f"; the last {held_out:,} examples are held out" if held_out else ""
        packed = f"; packed into {batches.rows:,} rows" if pack else ""
        print(f"{found}{held}{packed}", flush=True)
    return fit_prepared(model, batches, validation_data=validation_data, **options)


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
    rows, x = _are_rows(model, x)
    if not rows:
        _refuse_without_rows(model, pack, on_too_long)
        return plain(x, batch_size=batch_size, **options)
    _refuse_beside_rows(options)
    found = read_examples(model, x, on_too_long)
    return prepared(_batches(model, found.examples, batch_size, pack), **options)


def read_examples(model, source: Any, on_too_long: str = "truncate") -> Examples:
    """What a model is to learn from rows.

    Args:
        model: a `GemmaCausalLM` with a preprocessor.
        source: as `gemma_keras.train.rows.read_rows` takes it.
        on_too_long: as of `gemma_keras.train.examples.make_examples`.

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
    )
    # The last token of an example is a target, and no input.
    return make_examples(read_rows(source), render, preprocessor.sequence_length + 1, on_too_long)


def _are_rows(model, source: Any) -> tuple[bool, Any]:
    """Whether a model can read a source as rows; and the source, whole."""
    if model.preprocessor is None or source is None:
        return False, source
    return peeked(source)


def _holds_strings(source: Any) -> bool:
    """Whether it is a `tf.data.Dataset` of texts, which alone may stay a stream."""
    dtype = getattr(getattr(source, "element_spec", None), "dtype", None)
    return getattr(dtype, "name", None) == "string"


def _refuse_beside_rows(options: dict[str, Any]) -> None:
    for name in ("y", "sample_weight", "class_weight"):
        if options.pop(name, None) is not None:
            raise ValueError(
                f"{name} is for arrays, and x holds rows, which say themselves what is learnt"
            )


def _refuse_without_rows(model, pack: bool, on_too_long: str, validation_data: Any = None) -> None:
    if pack or on_too_long != "truncate":
        given = "pack" if pack else "on_too_long"
        why = "the model has no preprocessor" if model.preprocessor is None else "x holds none"
        raise ValueError(f"{given} is for rows, but {why}")
    if not isinstance(validation_data, (list, tuple)) and _are_rows(model, validation_data)[0]:
        raise ValueError("validation_data holds rows, and x does not; give both in one form")


def _batches(model, examples: Sequence[Example], batch_size, packed: bool, **options) -> RowBatches:
    most = model.preprocessor.sequence_length
    longest = max(map(len, examples)) - 1
    length = most if packed else min(most, -(-longest // _ROUND) * _ROUND)
    pad = model.preprocessor.tokenizer.pad_token_id
    return RowBatches(examples, length, batch_size or _BATCH_SIZE, packed, pad=pad, **options)
