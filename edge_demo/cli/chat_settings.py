"""Implements `/set` of `chat`: shows and changes the settings of sampling and of the context."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any, cast

from edge_demo.bundle.reader import Bundle
from edge_demo.cli import options
from edge_demo.engine.runner import CandidateEngine
from edge_demo.errors import RequestError, brief
from edge_demo.text.conversation import OVERFLOWS, Overflow
from edge_demo.text.generator import Generator, candidates_suffice
from edge_demo.text.sampling import Sampler
from edge_demo.text.session import ChatSession

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Sampler)}
NAMES = (*_DEFAULTS, "max_tokens", "overflow")


class ChatSettings:
    """The settings of a chat, by the names of the command's options.

    Args:
        bundle: that is run.
        generator: of the chat, whose engine stays open.
        session: whose settings these are.
    """

    def __init__(self, bundle: Bundle, generator: Generator, session: ChatSession) -> None:
        self._bundle = bundle
        self._generator = generator
        self._session = session

    def shown(self, name: str) -> str:
        """A setting and its value, for people."""
        holder = self._session.sampler if name in _DEFAULTS else self._session
        value = getattr(holder, name)
        return f"{_spoken(name)} {'none' if value is None else value}"

    def change(self, text: str) -> str:
        """Change a setting from the next answer on.

        Args:
            text: its name and its value; without a value nothing changes.

        Returns:
            The setting as it is now.

        Raises:
            RequestError: there is no such setting, the value is not valid, or the engine that is
                open does not suffice.
        """
        name, *rest = re.split(r"[\s=]+", text.strip(), maxsplit=1)
        name = name.lower().replace("-", "_")
        if name not in NAMES:
            known = ", ".join(map(_spoken, NAMES))
            raise RequestError(f"there is no setting {brief(name, 40)!r}; the settings are {known}")
        if rest and rest[0]:
            self._change(name, rest[0])
        return self.shown(name)

    def _change(self, name: str, text: str) -> None:
        if name == "max_tokens":
            self._session.max_tokens = _max_tokens(text)
        elif name == "overflow":
            if text not in OVERFLOWS:
                raise RequestError(
                    f"overflow must be {' or '.join(OVERFLOWS)}, not {brief(text, 40)!r}"
                )
            self._session.overflow = cast(Overflow, text)
        else:
            self._change_sampler(name, _number(name, text))

    def _change_sampler(self, name: str, value: Any) -> None:
        changed = dataclasses.replace(self._session.sampler, **{name: value})
        engine, tokenizer = self._generator.engine, self._generator.tokenizer
        suffices = not isinstance(engine, CandidateEngine) or candidates_suffice(
            self._bundle, changed, tokenizer
        )
        if not suffices:
            raise RequestError(
                f"{_spoken(name)} {value} needs the logits of all tokens, but this chat computes "
                f"the {self._bundle.num_candidates} likeliest; start edge-demo chat with "
                f"--{_spoken(name)} {value}"
            )
        if name == "seed":
            self._session.sampler = changed  # its random numbers begin again
        else:  # those of the sampler go on
            setattr(self._session.sampler, name, value)


def _max_tokens(text: str) -> int:
    try:
        return options.positive(text)
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"max-tokens: {error}") from None


def _number(name: str, text: str) -> Any:
    if name == "seed" and text.lower() == "none":
        return None
    kind = int if name == "seed" else type(_DEFAULTS[name])
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{_spoken(name)} must be {what}, not {brief(text, 40)!r}") from None


def _spoken(name: str) -> str:
    return name.replace("_", "-")
