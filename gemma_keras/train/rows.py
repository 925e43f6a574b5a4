"""Reads training rows from lists, columns, JSONL files, datasets and loaders.

A row is a text, or a mapping with one of these sets of keys; other keys are left alone:

* `text`: a text.
* `prompt` and `completion`, as TRL names them, or `prompts` and `responses`, as KerasHub does: two
  texts, of which the second is learnt. As messages, they are the two parts of a conversation.
* `messages`: a conversation, `{"role": ..., "content": ...}` each.
* `prompt`, `chosen` and `rejected`: an answer that is preferred to another.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_keras.errors import quoted
from gemma_keras.train.errors import RowError

# Sets of keys that a row has, the more telling first.
KINDS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "conversation": ("messages",),
    "completion": ("prompt", "completion"),
    "response": ("prompts", "responses"),
    "text": ("text",),
}
_WITHOUT_END = -1  # the cardinality of such a tf.data.Dataset
_MOST_LINE_BYTES = 64 << 20  # of a JSONL file; a longer one is no row


class Row(NamedTuple):
    """A row, and where it stands.

    Attributes:
        where: for people, such as `row 3` or `data.jsonl, line 7`; counted from 1.
        value: a text or a mapping.
    """

    where: str
    value: str | Mapping[str, Any]


def kind_of(keys: Iterable[str]) -> str | None:
    """Which of `KINDS` has these keys."""
    given = set(keys)
    return next((kind for kind, needed in KINDS.items() if given.issuperset(needed)), None)


def peeked(source: Any) -> tuple[bool, Any]:
    """Whether a source holds rows, and not arrays that are ready; and the source, still whole.

    Args:
        source: anything that `fit` is given; an iterator is looked into.
    """
    if isinstance(source, os.PathLike) or _is_jsonl(source):
        return True, source
    if isinstance(source, Mapping):
        return kind_of(source) is not None, source
    if isinstance(source, np.ndarray):
        return source.dtype.kind in "UO" and source.ndim == 1, source
    if isinstance(source, (list, tuple)):
        return bool(source) and _is_row_or_batch(source[0]), source
    if hasattr(source, "element_spec"):  # a tf.data.Dataset; one of texts is a stream as it is
        spec = source.element_spec
        return isinstance(spec, Mapping) and kind_of(spec) is not None, source
    if hasattr(source, "column_names"):  # of Hugging Face datasets
        return kind_of(source.column_names or ()) is not None, source
    if hasattr(source, "num_batches"):  # a PyDataset
        return bool(source.num_batches) and _is_row_or_batch(source[0]), source
    if isinstance(source, Iterator):
        first = next(source, _NOTHING)
        whole = source if first is _NOTHING else itertools.chain([first], source)
        return first is not _NOTHING and _is_row_or_batch(first), whole
    if hasattr(source, "dataset") and isinstance(source, Iterable):  # a torch DataLoader
        return _is_row_or_batch(next(iter(source), None)), source
    return False, source


_NOTHING = object()


def _is_row_or_batch(item: Any) -> bool:
    """Whether an item is a row, or a batch of rows in a list or in columns."""
    if isinstance(item, Mapping):
        return kind_of(item) is not None
    if isinstance(item, list):
        return bool(item) and isinstance(item[0], (str, Mapping)) and _is_row_or_batch(item[0])
    return isinstance(item, str)


def read_rows(source: Any) -> Iterator[Row]:
    """The rows of a source, one after another.

    Args:
        source: a list of rows, a mapping of columns, the path of a JSONL file, a `tf.data.Dataset`,
            a Hugging Face dataset; or a `keras.utils.PyDataset`, a torch `DataLoader`, a generator
            or whatever else gives rows, lists of rows, or mappings of columns.

    Raises:
        RowError: a row is of no kind that is known, columns differ in length, or a line of a file
            is not JSON.
        OSError: the file cannot be read.
    """
    if isinstance(source, os.PathLike) or _is_jsonl(source):
        yield from _read_jsonl(Path(source))
        return
    number = 0
    try:
        for number, value in enumerate(_values(source), start=1):
            yield Row(f"row {number:,}", value)
    except RowError as error:
        raise RowError(f"row {number + 1:,}: {error}") from None


def _values(source: Any) -> Iterator[str | Mapping[str, Any]]:
    """Rows of a source in memory, or of one that is iterated; batches are taken apart."""
    for item in _items(source):
        if isinstance(item, bytes):
            yield item.decode("utf-8", "replace")
        elif isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            yield from _rows_of_mapping({key: _plain(value) for key, value in item.items()})
        else:
            plain = _plain(item)
            if isinstance(plain, str):
                yield plain
            elif isinstance(plain, (list, tuple)):
                yield from _values(plain)
            else:
                raise RowError(f"a row must be a text or a mapping, but {quoted(item)} is neither")


def _items(source: Any) -> Iterator[Any]:
    if isinstance(source, Mapping):
        yield source
    elif hasattr(source, "as_numpy_iterator"):
        if source.cardinality() == _WITHOUT_END:
            raise RowError("the dataset has no end; leave out repeat(), and give epochs to fit")
        yield from source.as_numpy_iterator()
    elif hasattr(source, "num_batches") and hasattr(source, "__getitem__"):  # a PyDataset
        count = source.num_batches
        if count is None:
            raise RowError("a PyDataset of rows must have a length; define __len__")
        for index in range(count):
            yield source[index]
    elif isinstance(source, Iterable):
        yield from source
    else:
        raise RowError(f"rows cannot be read from {type(source).__name__}")


def _rows_of_mapping(item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The row that a mapping is, or those of its columns."""
    kind = kind_of(item)
    if kind is None:
        raise RowError(_unknown(item))
    columns = {key: item[key] for key in KINDS[kind]}
    if not all(_is_column(key, value) for key, value in columns.items()):
        yield item
        return
    lengths = {key: len(value) for key, value in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} {length:,}" for key, length in lengths.items())
        raise RowError(f"columns must have the same number of rows; found {found}")
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, map(_plain, values), strict=True))


def _unknown(item: Mapping[str, Any]) -> str:
    needed = ", or ".join(" and ".join(keys) for keys in KINDS.values())
    return f"a row has the keys {', '.join(map(quoted, item)) or 'none'}; it needs {needed}"


def _is_column(key: str, value: Any) -> bool:
    """Whether it is the values of many rows, and not that of one, which may be messages."""
    if not isinstance(value, (list, tuple)):
        return False
    return not isinstance(value[0], Mapping) if value else key != "messages"


def _plain(value: Any) -> Any:
    """What a backend's string tensors and numpy's arrays hold, as Python has it."""
    if hasattr(value, "numpy") and not isinstance(value, (str, bytes)):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _is_jsonl(source: Any) -> bool:
    return isinstance(source, str) and source.lower().endswith((".jsonl", ".ndjson"))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number += 1
            where = f"{path.name}, line {number:,}"
            if len(line) > _MOST_LINE_BYTES:
                raise RowError(f"{where}: it is longer than {_MOST_LINE_BYTES >> 20} MiB")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                cut = "" if line.endswith(b"\n") else "; the file may be truncated"
                raise RowError(f"{where}: it is not JSON: {error}{cut}") from None
            if not isinstance(value, (str, dict)):
                raise RowError(f"{where}: a row must be a text or an object")
            if isinstance(value, dict) and kind_of(value) is None:
                raise RowError(f"{where}: {_unknown(value)}")
            yield Row(where, value)
