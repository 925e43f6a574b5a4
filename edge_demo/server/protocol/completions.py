"""`/v1/completions`: texts that are continued.

After OpenAI's API reference, "Completions" (legacy).
"""

from __future__ import annotations

from typing import Any

from edge_demo.server.protocol.answer import Answer, Choice
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.formats import read_format
from edge_demo.server.protocol.request import GenerateRequest, Prompt, read_stream
from edge_demo.server.protocol.settings import IGNORED, read_settings

_MOST_TOP = 5
_MOST_PROMPTS = 16
_MOST_IDS = 10**6


def read_completion(value: Any, vocabulary_size: int) -> GenerateRequest:
    """A request to continue texts.

    Args:
        value: the request's JSON.
        vocabulary_size: of the model.

    Raises:
        Refusal: a field is wrong, or cannot be honoured.
    """
    fields = Fields(value)
    fields.ignore(IGNORED)
    fields.refuse("suffix", "this server continues texts, and fills none in", harmless=("",))
    fields.refuse("echo", "this server does not repeat the prompt", harmless=(False,))
    best_of = fields.whole("best_of", 1, 20)
    top = fields.whole("logprobs", 0, _MOST_TOP)
    settings = read_settings(fields, ("max_tokens",), top, vocabulary_size, read_format(fields))
    if best_of is not None and best_of != settings.choices:
        raise Refusal("best_of must equal n", code="unsupported", param="best_of")
    prompts = _prompts(fields, vocabulary_size)
    stream, usage = read_stream(fields)
    return GenerateRequest(
        model=fields.text("model"),
        prompts=prompts,
        settings=settings,
        stream=stream,
        usage=usage,
        unknown=fields.unknown,
    )


def _prompts(fields: Fields, vocabulary_size: int) -> tuple[Prompt, ...]:
    value = fields.any("prompt")
    if isinstance(value, str):
        return (Prompt(text=value),)
    items = fields.items("prompt", _MOST_IDS)
    if not items:
        raise fields.wrong("prompt", "text, a list of texts, or token ids")
    if all(type(item) is int for item in items):
        return (Prompt(ids=_ids(items, vocabulary_size)),)
    if len(items) > _MOST_PROMPTS:
        raise Refusal(
            f"prompt has {len(items):,} texts; the limit is {_MOST_PROMPTS}", param="prompt"
        )
    prompts = []
    for item in items:
        if isinstance(item, str):
            prompts.append(Prompt(text=item))
        elif isinstance(item, list) and item and all(type(i) is int for i in item):
            prompts.append(Prompt(ids=_ids(item, vocabulary_size)))
        else:
            raise fields.wrong("prompt", "text, a list of texts, or token ids")
    return tuple(prompts)


def _ids(items: list[int], vocabulary_size: int) -> tuple[int, ...]:
    for token in items:
        if not 0 <= token < vocabulary_size:
            raise Refusal(
                f"prompt has the token id {token}, which is not below {vocabulary_size:,}",
                param="prompt",
            )
    return tuple(items)


class CompletionForm:
    """Answers as text completions."""

    named = False

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer."""
        choices = [_choice(choice) for choice in answer.choices]
        return _chunk(answer, choices) | {"usage": answer.usage, "timings": answer.timings}

    def begin(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """Nothing: a text has no role."""
        return []

    def piece(self, answer: Answer, choice: Choice) -> list[dict[str, Any]]:
        """A piece of the text."""
        return [_chunk(answer, [_choice(choice)])] if choice.text or choice.logprobs else []

    def end(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """Why it ended."""
        choice = Choice(index, finish_reason=answer.choices[index].finish_reason)
        return [_chunk(answer, [_choice(choice)])]

    def close(self, answer: Answer, usage: bool) -> list[dict[str, Any]]:
        """How many tokens there were."""
        if not usage:
            return []
        return [_chunk(answer, []) | {"usage": answer.usage, "timings": answer.timings}]

    def fail(self, answer: Answer, refusal: Refusal) -> list[dict[str, Any]]:
        """The error, which OpenAI's client raises."""
        return [refusal.body]


def _chunk(answer: Answer, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answer.id}",
        "object": "text_completion",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "system_fingerprint": answer.fingerprint,
    }


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": _logprobs(choice),
        "finish_reason": choice.finish_reason,
    }


def _logprobs(choice: Choice) -> dict[str, Any] | None:
    if choice.logprobs is None:
        return None

    def text(piece: bytes) -> str:
        return piece.decode("utf-8", "replace")

    tokens = choice.logprobs
    return {
        "tokens": [text(t.token.piece) for t in tokens],
        "token_logprobs": [t.token.logprob for t in tokens],
        "top_logprobs": [{text(o.piece): o.logprob for o in t.top} for t in tokens],
    }
