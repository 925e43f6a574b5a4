"""Reads training rows from lists, columns, JSONL files, datasets and loaders.

A row is a text, or a mapping with one of these sets of keys; other keys are left alone:

* `text`: a text.
* `prompt` and `completion` (TRL), `prompts` and `responses` (KerasHub), or `prompt` and `response`:
  two texts, of which the second is learnt. As messages they are two parts of a conversation.
* `messages`: a conversation, `{"role": ..., "content": ...}` each.
* `prompt`, `chosen` and `rejected`: an answer that is preferred to another. Without a `prompt`, or
  with messages beside a text of that name, the prompt is what both begin with (TRL).
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
    "preference without a prompt": ("chosen", "rejected"),
    "conversation": ("messages",),
    "completion": ("prompt", "completion"),
    "response": ("prompts", "responses"),
    "answer": ("prompt", "response"),
    "text": ("text",),
}
_WITHOUT_END = -1  # the cardinality of such a tf.data.Dataset
_GZIP = b"\x1f\x8b"
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
    """Whether a source is to be read as rows, and is not ready for Keras; and the source, whole.

    Ready are arrays, mappings of them with `token_ids`, streams of texts in batches, and whatever
    gives these. What is neither rows nor ready counts as rows, so that reading tells what is wrong.

    Args:
        source: anything that `fit` is given; an iterator is looked into.
    """
    if hasattr(source, "element_spec"):  # a tf.data.Dataset
        return not _is_ready_spec(source.element_spec), source
    if _is_frame(source) or hasattr(source, "column_names"):
        return True, source
    if hasattr(source, "num_batches") and hasattr(source, "__getitem__"):  # a PyDataset
        count = source.num_batches
        return count == 0 or not _is_ready(source[0]), source
    if isinstance(source, Iterator) or _is_loader(source):
        items = iter(source)
        first = next(items, _NOTHING)
        if first is _NOTHING:
            return True, ()
        ready = _is_ready(first)
        whole = source if ready and _is_loader(source) else itertools.chain([first], items)
        return not ready, whole
    return not _is_ready(source), source


_NOTHING = object()


def _is_loader(source: Any) -> bool:
    """Whether it is a torch `DataLoader`."""
    return hasattr(source, "dataset") and hasattr(source, "batch_size")


def _is_frame(source: Any) -> bool:
    """Whether it is a `pandas.DataFrame`."""
    return hasattr(source, "to_dict") and hasattr(source, "columns")


def _is_ready_spec(spec: Any) -> bool:
    """Whether elements of a `tf.data.Dataset` need no reading: no rows, and no single texts."""
    if isinstance(spec, Mapping):
        return "token_ids" in spec
    single_text = getattr(getattr(spec, "dtype", None), "name", None) == "string"
    return not (single_text and spec.shape.rank == 0)


def _is_ready(item: Any) -> bool:
    """Whether Keras takes it as it is: arrays of numbers, or tuples and mappings of them."""
    if item is None:
        return True
    if isinstance(item, Mapping):
        return "token_ids" in item
    if isinstance(item, tuple):
        return bool(item) and _is_ready(item[0])
    if isinstance(item, (list, str, bytes)):
        return False
    dtype = str(getattr(item, "dtype", "object"))
    texts = dtype.startswith(("<U", ">U", "|S", "object", "string", "str")) or "string" in dtype
    return hasattr(item, "shape") and not texts


def read_rows(source: Any, most: int | None = None) -> Iterator[Row]:
    """The rows of a source, one after another.

    Args:
        source: a list of rows, a mapping of columns, the path of a JSONL file, a `tf.data.Dataset`,
            a Hugging Face dataset; or a `keras.utils.PyDataset`, a torch `DataLoader`, a generator
            or whatever else gives rows, lists of rows, or mappings of columns.
        most: rows that are read; by default all, and then a source without an end is refused.

    Raises:
        RowError: a row is of no kind that is known, columns differ in length, a line of a file is
            not JSON, or the source cannot be read as rows.
        OSError: the file cannot be read.
    """
    if isinstance(source, os.PathLike) or _is_jsonl(source):
        yield from itertools.islice(_read_jsonl(Path(source).expanduser()), most)
        return
    _refuse_source(source, most)
    number = 0
    try:
        for number, value in enumerate(itertools.islice(_values(source), most), start=1):
            if _is_jsonl(value):
                number -= 1
                raise RowError(f"{quoted(value)} is the name of a file; give the path of one file")
            yield Row(f"row {number:,}", value)
    except RowError as error:
        raise RowError(f"row {number + 1:,}: {error}") from None


def has_length(source: Any) -> bool:
    """Whether a source says how many rows or batches it has, and so has an end."""
    if isinstance(source, os.PathLike) or _is_jsonl(source):
        return True
    try:
        len(source)
    except TypeError:
        return False
    return True


def _refuse_source(source: Any, most: int | None) -> None:
    """Say what is wrong with a source that gives no rows."""
    if isinstance(source, (str, bytes)):
        raise RowError(
            f"{quoted(source)} is one text; give a list of texts, or the path of a JSONL file as a "
            "pathlib.Path"
        )
    if isinstance(source, Mapping) and kind_of(source) is None:
        splits = [key for key, value in source.items() if hasattr(value, "column_names")]
        if splits:
            raise RowError(
                f"it is a set of datasets; give one of them, such as rows[{quoted(splits[0])}]"
            )
        raise RowError(_unknown(source))
    if most is None and hasattr(source, "cardinality") and source.cardinality() == _WITHOUT_END:
        raise RowError(
            "the dataset has no end; leave out repeat() and give epochs, or give steps_per_epoch"
        )
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise RowError(f"rows cannot be read from {type(source).__name__}")


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
    if _is_frame(source):
        yield source.to_dict("list")
    elif isinstance(source, Mapping):
        yield source
    elif hasattr(source, "as_numpy_iterator"):
        yield from source.as_numpy_iterator()
    elif hasattr(source, "num_batches") and hasattr(source, "__getitem__"):  # a PyDataset
        count = source.num_batches
        if count is None:
            raise RowError("a PyDataset of rows must have a length; define __len__")
        for index in range(count):
            yield source[index]
    elif hasattr(source, "numpy") and not isinstance(source, Iterable):
        yield source.numpy()
    elif isinstance(source, Iterable):
        yield from source
    elif hasattr(source, "__len__"):  # a torch Dataset
        for index in range(len(source)):
            yield source[index]
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
    return isinstance(source, str) and source.lower().endswith((".jsonl", ".ndjson", ".json"))


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
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                why = "it is compressed" if line.startswith(_GZIP) else f"it is not UTF-8: {error}"
                raise RowError(f"{where}: {why}") from None
            except (ValueError, RecursionError) as error:
                cut = "" if line.endswith(b"\n") else "; the file may be truncated"
                if number == 1 and line.lstrip().startswith((b"[", b"{")):
                    cut = "; each line must hold one row"
                raise RowError(f"{where}: it is not JSON: {error}{cut}") from None
            if not isinstance(value, (str, dict)):
                raise RowError(f"{where}: a line must hold one row, a text or an object")
            if isinstance(value, dict) and kind_of(value) is None:
                raise RowError(f"{where}: {_unknown(value)}")
            yield Row(where, value)
