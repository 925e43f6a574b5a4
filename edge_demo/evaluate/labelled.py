"""Reads files of texts that are labelled safe or unsafe, such as XSTest's csv.

XSTest: Röttger et al., 2024, arXiv:2308.01263; its columns are `id,prompt,type,label,focus,note`.
Its first version has no labels, since all of its prompts are safe.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from edge_demo.errors import RequestError, brief

_UNSAFE = {"unsafe": True, "safe": False, "yes": True, "no": False, "1": True, "0": False}
_MOST_TEXT = 10**6  # characters of a field; csv's own limit is less
_NAMES = ("prompt", "label", "response", "type")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text of which it is known whether it is unsafe.

    Attributes:
        prompt: what a user wrote.
        unsafe: the label.
        response: what a model answered, where the label is of the response.
        type: a kind of texts, such as XSTest's `homonyms`; may be empty.
    """

    prompt: str
    unsafe: bool
    response: str | None = None
    type: str = ""


def read_labelled(path: str, text: str) -> list[Labelled]:
    """The texts of a csv or JSON-lines file.

    A file whose first line begins with `{` has JSON lines. Others are csv with a header. Line ends
    may be of any system, a byte order mark is skipped, and space around labels and types is
    ignored. Other columns are ignored.

    Args:
        path: of the file, for messages.
        text: of the file.

    Returns:
        At least one.

    Raises:
        RequestError: a column is missing, a label is not known, or there is no text.
    """
    text = text.removeprefix("\ufeff")
    rows = _json_rows(path, text) if text.lstrip()[:1] == "{" else _csv_rows(path, text)
    found = [_labelled(where, row) for where, row in rows]
    if not found:
        raise RequestError(f"{path} has no texts; it must have the columns prompt and label")
    return found


def _csv_rows(path: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(_MOST_TEXT)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        for name in ("prompt", "label"):
            if name not in names:
                raise RequestError(
                    f"{path} lacks the column {name}; its columns are {brief(', '.join(names))}"
                )
        for row in reader:
            yield f"line {reader.line_num} of {path}", row
    except csv.Error as error:
        raise RequestError(f"line {reader.line_num} of {path} is not csv: {error}") from None


def _json_rows(path: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise RequestError(f"{where} is not JSON") from None
        if not isinstance(row, dict):
            raise RequestError(f"{where} must be a JSON object")
        yield where, row


def _labelled(where: str, row: Mapping[str, Any]) -> Labelled:
    prompt, label, response, kind = (row.get(name) for name in _NAMES)
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"{where} has no prompt")
    if isinstance(label, bool):
        label = "yes" if label else "no"
    unsafe = _UNSAFE.get(str(label).strip().lower())
    if unsafe is None:
        raise RequestError(f"{where} has the label {brief(label, 40)!r}; it must be safe or unsafe")
    if not isinstance(response, str | None) or not isinstance(kind, str | None):
        raise RequestError(f"{where} has a response or a type that is not text")
    return Labelled(prompt, unsafe, response or None, (kind or "").strip())
