"""Reads the fields of a request's object, and says what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from edge_demo.errors import brief
from edge_demo.server.protocol.errors import Refusal

_SHOWN = 80  # characters of a wrong value
_MOST_LEVELS = 64  # of a schema


class Fields:
    """The fields of one JSON object; `null` is as good as absent.

    Args:
        value: the object.
        path: where it stands, such as `stream_options`; empty for the request itself.

    Raises:
        Refusal: it is not an object.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            what = f"{path} must be" if path else "the request must be"
            raise Refusal(f"{what} a JSON object", param=path or None)
        self._value = value
        self._path = path
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._value.get(name) is not None

    def any(self, name: str) -> Any:
        """The field's value, whatever it is; `None` if absent."""
        self._read.add(name)
        return self._value.get(name)

    def where(self, name: str) -> str:
        """The field's name with those of the objects around it."""
        return f"{self._path}.{name}" if self._path else name

    def wrong(self, name: str, expected: str) -> Refusal:
        """Returns a refusal of a field's value."""
        found = brief(repr(self._value.get(name)), _SHOWN)
        where = self.where(name)
        return Refusal(f"{where} must be {expected}, not {found}", param=where)

    def text(self, name: str, most: int | None = None) -> str | None:
        """A text of at most so many characters."""
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "text")
        if most is not None and len(value) > most:
            where = self.where(name)
            raise Refusal(
                f"{where} has {len(value):,} characters; the limit is {most:,}", param=where
            )
        return value

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value = self.any(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number of a range, both ends included."""
        value = self.any(name)
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not least <= value <= most:
            raise self.wrong(name, f"a number between {least:g} and {most:g}")
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number of a range, both ends included; `4.0` is one in JSON."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"a whole number between {least:,} and {most:,}")
        return value

    def choice(self, name: str, among: Collection[str]) -> str | None:
        """One of some texts."""
        value = self.any(name)
        if value is not None and (not isinstance(value, str) or value not in among):
            raise self.wrong(name, " or ".join(map(repr, among)))
        return value

    def items(self, name: str, most: int) -> list[Any] | None:
        """A list of at most so many values."""
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        if len(value) > most:
            where = self.where(name)
            raise Refusal(f"{where} has {len(value):,} items; the limit is {most:,}", param=where)
        return value

    def inner(self, name: str) -> Fields | None:
        """The fields of an object within this one."""
        value = self.any(name)
        return None if value is None else Fields(value, self.where(name))

    def schema(self, name: str, most: int) -> dict[str, Any] | None:
        """A JSON schema of at most so many characters, which is not nested deep."""
        value = self.any(name)
        if value is None:
            return None
        where = self.where(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "a JSON schema, an object")
        if _deeper(value, _MOST_LEVELS):
            raise Refusal(f"{where} has over {_MOST_LEVELS} levels", param=where)
        size = len(json.dumps(value, ensure_ascii=False))
        if size > most:
            raise Refusal(f"{where} has {size:,} characters; the limit is {most:,}", param=where)
        return value

    def ignore(self, names: Collection[str]) -> None:
        """Accept fields that say nothing to this server."""
        self._read.update(names)

    def refuse(self, name: str, why: str, harmless: Collection[Any] = ()) -> None:
        """Refuse a field that cannot be honoured, unless it has a value that asks for nothing."""
        value = self.any(name)
        if value is None or any(value == one and type(value) is type(one) for one in harmless):
            return
        raise Refusal(f"{self.where(name)}: {why}", code="unsupported", param=self.where(name))

    @property
    def unknown(self) -> int:
        """How many fields nobody has asked for."""
        return len(self._value.keys() - self._read)


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other more often than so."""
    found = [value]
    for _ in range(levels):
        found = [
            inner
            for one in found
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not found:
            return False
    return True
