"""The input of a batch: a file of prompts, one JSON object a line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from edge_demo.errors import RequestError
from edge_demo.sampling import Sampler

_MAX_LINE = 4 << 20
_MAX_ID = 1000
_KEYS = ("prompt", "id", "max_tokens", "temperature", "top_k", "top_p", "seed")


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt and how to go on from it.

    Attributes:
        index: of the prompts in the file, from 0.
        id: as the file gives it; `None` if it does not.
        prompt: to continue.
        max_tokens: the most to generate.
        temperature: as `Sampler`.
        top_k: as `Sampler`.
        top_p: as `Sampler`.
        seed: of this prompt alone, so that it gets the same text whatever else is run.
    """

    index: int
    id: str | int | None
    prompt: str
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def sampler(self) -> Sampler:
        """A new one; errors as `Sampler`."""
        return Sampler(self.temperature, self.top_k, self.top_p, self.seed)

    def key(self, fingerprint: str) -> str:
        """Hash of all that decides its text, in hex.

        Args:
            fingerprint: of the bundle.
        """
        facts = json.dumps([fingerprint, dataclasses.astuple(self)])
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


def read_items(path: str | Path, defaults: Item) -> list[Item]:
    """The prompts of a file; empty lines are passed over.

    Args:
        path: of the file, UTF-8. A line is an object with `prompt` and, if wanted, `id` (text or a
            whole number), `max_tokens`, `temperature`, `top_k`, `top_p` and `seed`.
        defaults: what counts where a line says nothing. Its seed is that of the whole file: every
            line without one of its own gets one made of it and the line's place.

    Raises:
        RequestError: the file cannot be read or has no prompts, or a line is not what it must be;
            the message has its number.
    """
    items = []
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if line.strip():
                    try:
                        items.append(_item(line, len(items), defaults))
                    except RequestError as error:
                        raise RequestError(f"line {number:,} of {path}: {error}") from None
    except OSError as error:
        raise RequestError(f"the batch {path} cannot be read: {error.strerror}") from error
    if not items:
        raise RequestError(f"the batch {path} has no prompts")
    return items


def _item(line: bytes, index: int, defaults: Item) -> Item:
    if len(line) > _MAX_LINE:
        raise RequestError(f"it is longer than {_MAX_LINE:,} bytes")
    try:
        data = json.loads(line.decode("utf-8-sig" if index == 0 else "utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RequestError(f"it is not JSON: {error}") from None
    if not isinstance(data, dict) or "prompt" not in data:
        raise RequestError('it must be an object with a "prompt"')
    for key in data:
        if key not in _KEYS:
            raise RequestError(f"it has {reprlib.repr(key)}; there can be {', '.join(_KEYS)}")
    _check(data, "prompt", str, "text")
    _check(data, "id", (str, int, type(None)), "text or a whole number")
    if len(str(data.get("id"))) > _MAX_ID:
        raise RequestError(f'"id" is longer than {_MAX_ID:,} characters')
    for key in ("max_tokens", "top_k", "seed"):
        _check(data, key, int, "a whole number")
    for key in ("temperature", "top_p"):
        _check(data, key, (int, float), "a number")
    if "seed" not in data:
        sequence = np.random.SeedSequence([defaults.seed, index])
        data["seed"] = int(sequence.generate_state(1, np.uint64)[0])
    item = dataclasses.replace(defaults, index=index, **data)
    if item.max_tokens < 1:
        raise RequestError(f'"max_tokens" must be positive, not {item.max_tokens}')
    item.sampler()  # refuses what is out of range
    return item


def _check(data: dict[str, Any], key: str, kinds: Any, what: str) -> None:
    value = data.get(key)
    if key in data and (isinstance(value, bool) or not isinstance(value, kinds)):
        raise RequestError(f'"{key}" must be {what}, not {reprlib.repr(value)}')
