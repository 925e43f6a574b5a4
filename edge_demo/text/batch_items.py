"""Reads the input of a batch: a file of prompts, one JSON object per line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from edge_demo.errors import RequestError, brief
from edge_demo.text.messages import Turns, read_messages
from edge_demo.text.sampling import Sampler
from edge_demo.text.stop_texts import check_stop_texts
from edge_demo.text.tokenizer import Tokenizer

_MAX_LINE = 4 << 20
_MAX_ID = 1000
# Each key of a line and what its value must be.
_NUMBER, _WHOLE = ((int, float), "a number"), (int, "a whole number")
_KEYS: dict[str, tuple[Any, str]] = {
    "prompt": (str, "text"),
    "messages": (list, "a list of messages"),
    "id": ((str, int, type(None)), "text or a whole number"),
    "max_tokens": _WHOLE,
    "temperature": _NUMBER,
    "top_k": _WHOLE,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "seed": _WHOLE,
    "repeat_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repeat_last_n": _WHOLE,
    "stop": ((str, list), "text, or a list of texts"),
}


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt and its generation settings.

    Attributes:
        index: of the prompts in the file, from 0.
        id: as the file gives it; `None` if it does not.
        prompt: to continue; empty where there are `turns`.
        max_tokens: maximum number of tokens to generate.
        temperature: as in `Sampler`, like the settings after it.
        seed: of this prompt only, so that its text does not depend on other prompts.
        stop: texts that end the answer.
        turns: of a conversation to answer, instead of a prompt.
        system: the system text before the first turn.
    """

    index: int
    id: str | int | None
    prompt: str
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    stop: tuple[str, ...] = ()
    turns: Turns = ()
    system: str = ""

    def sampler(self) -> Sampler:
        """A new one; errors as `Sampler`."""
        return Sampler(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sampler)})

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the tokens of the prompt."""
        if self.turns:
            return tokenizer.encode_chat(self.turns, self.system)
        return tokenizer.encode(self.prompt)

    def key(self, fingerprint: str) -> str:
        """Hash, in hex, of everything that determines its completion.

        Args:
            fingerprint: of the bundle.
        """
        facts = json.dumps([fingerprint, dataclasses.astuple(self)])
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


def read_items(path: str | Path, defaults: Item, tuned: bool = False) -> list[Item]:
    """Reads the prompts of a file; empty lines are ignored.

    Args:
        path: of the file, UTF-8. A line is an object with `prompt` or `messages`. Optional keys are
            `id` (text or a whole number), `max_tokens`, `stop` and the settings of a `Sampler`.
        defaults: settings for lines that do not have their own. Its seed is for the whole file: a
            line without a seed gets one derived from it and the line's index.
        tuned: whether the model has a chat template, which `messages` need.

    Raises:
        RequestError: the file cannot be read or has no prompts, or a line is not valid; the message
            has its number.
    """
    items = []
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if line.strip():
                    try:
                        items.append(_item(line, len(items), defaults, tuned))
                    except RequestError as error:
                        raise RequestError(f"line {number:,} of {path}: {error}") from None
    except OSError as error:
        raise RequestError(f"the batch {brief(path)} cannot be read: {error.strerror}") from error
    if not items:
        raise RequestError(f"the batch {path} has no prompts")
    return items


def _item(line: bytes, index: int, defaults: Item, tuned: bool) -> Item:
    data = _object(line, index)
    if "messages" in data:
        if not tuned:
            raise RequestError(
                'it has "messages", but the bundle is a base model without a chat '
                'template; use "prompt" instead'
            )
        data["system"], data["turns"] = read_messages(data.pop("messages"))
        data["prompt"] = ""
    if "stop" in data:
        data["stop"] = check_stop_texts(data["stop"])
    if "seed" not in data:
        sequence = np.random.SeedSequence([defaults.seed, index])
        data["seed"] = int(sequence.generate_state(1, np.uint64)[0])
    item = dataclasses.replace(defaults, index=index, **data)
    if item.max_tokens < 1:
        raise RequestError(f'"max_tokens" must be positive, not {brief(item.max_tokens)}')
    item.sampler()  # raises an error for values out of range
    return item


def _object(line: bytes, index: int) -> dict[str, Any]:
    """The line's object, whose keys are known and have values of the right kinds."""
    if len(line) > _MAX_LINE:
        raise RequestError(f"it is longer than {_MAX_LINE:,} bytes")
    try:
        data = json.loads(line.decode("utf-8-sig" if index == 0 else "utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RequestError(f"it is not JSON: {brief(error)}") from None
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise RequestError('it must be an object with either "prompt" or "messages"')
    for key, value in data.items():
        if key not in _KEYS:
            raise RequestError(f"it has {brief(key, 40)!r}; there can be {', '.join(_KEYS)}")
        kinds, what = _KEYS[key]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise RequestError(f'"{key}" must be {what}, not {brief(value, 40)}')
    if any(not isinstance(text, str) for text in data.get("stop", ())):
        raise RequestError('"stop" must be text, or a list of texts')
    if len(str(data.get("id"))) > _MAX_ID:
        raise RequestError(f'"id" is longer than {_MAX_ID:,} characters')
    return data
