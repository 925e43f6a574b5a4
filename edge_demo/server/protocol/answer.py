"""An answer, before it gets the form of a route."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

from edge_demo.server.protocol.errors import Refusal


class TokenText(NamedTuple):
    """A token of an answer.

    Attributes:
        piece: its bytes, which may be a part of a character.
        logprob: natural logarithm of its probability.
    """

    piece: bytes
    logprob: float


class TokenLogProbs(NamedTuple):
    """A token with its likeliest alternatives."""

    token: TokenText
    top: tuple[TokenText, ...]


@dataclasses.dataclass
class CallPiece:
    """A call of a tool, or a piece of it.

    Attributes:
        number: of the call in its answer, from 0.
        id: of the call.
        name: of the tool; `None` where the piece only goes on.
        arguments: text of their JSON.
    """

    number: int
    id: str
    name: str | None = None
    arguments: str = ""


@dataclasses.dataclass
class Choice:
    """One of the answers to a prompt, or a piece of it.

    Attributes:
        index: of the choice.
        text: of it.
        finish_reason: `stop`, `length`, `tool_calls` or `content_filter`; `None` while it goes on.
        logprobs: of its tokens, where they were asked for.
        calls: of tools.
    """

    index: int
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogProbs] | None = None
    calls: list[CallPiece] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Answer:
    """All choices.

    Attributes:
        id: of the request.
        created: seconds since 1970.
        model: the bundle's name.
        fingerprint: of the bundle.
        choices: by index.
        prompt_tokens: of all prompts.
        cached_tokens: of them, those that had been run before.
        completion_tokens: of all choices.
        prompt_s: seconds until the first token, of the slowest choice.
        predicted_s: seconds from the first token to the last, of the slowest choice.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    choices: list[Choice] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_s: float = 0.0
    predicted_s: float = 0.0

    @property
    def usage(self) -> dict[str, Any]:
        """The numbers of tokens, as OpenAI has them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    @property
    def timings(self) -> dict[str, Any]:
        """How long it took, under the names of llama.cpp's server."""
        computed = self.prompt_tokens - self.cached_tokens
        later = self.completion_tokens - len(self.choices)
        return {
            "cache_n": self.cached_tokens,
            "prompt_n": computed,
            "prompt_ms": round(1000 * self.prompt_s, 3),
            "prompt_per_second": round(computed / self.prompt_s, 3) if self.prompt_s else None,
            "predicted_n": self.completion_tokens,
            "predicted_ms": round(1000 * self.predicted_s, 3),
            "predicted_per_second": round(later / self.predicted_s, 3)
            if self.predicted_s
            else None,
        }


def token_fields(token: TokenText) -> dict[str, Any]:
    """A token as OpenAI shows it; bytes of a part of a character become U+FFFD in its text."""
    return {
        "token": token.piece.decode("utf-8", "replace"),
        "logprob": token.logprob,
        "bytes": list(token.piece),
    }


def logprobs_of(token: TokenLogProbs) -> dict[str, Any]:
    """A token and its alternatives as the chat route shows them."""
    return token_fields(token.token) | {"top_logprobs": [token_fields(t) for t in token.top]}


class Form(Protocol):
    """How a route shows one answer: whole, or as the objects of a stream.

    Attributes:
        named: whether the events of a stream have names, which are the types of their objects.
    """

    named: bool

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer."""
        ...

    def begin(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """What comes before the first text of a choice."""
        ...

    def piece(self, answer: Answer, choice: Choice) -> list[dict[str, Any]]:
        """A piece of a choice, which has the piece's text alone."""
        ...

    def end(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """What comes after the last text of a choice."""
        ...

    def close(self, answer: Answer, usage: bool) -> list[dict[str, Any]]:
        """What comes after all choices, where usage is wanted or in any case."""
        ...

    def fail(self, answer: Answer, refusal: Refusal) -> list[dict[str, Any]]:
        """What comes in place of the rest."""
        ...
