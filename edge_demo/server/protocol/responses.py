"""`/v1/responses`, without memory: each request brings its whole conversation.

After OpenAI's API reference, "Responses". A stream has named events with numbers in sequence.
"""

from __future__ import annotations

from typing import Any

from edge_demo.server.protocol.answer import Answer, Choice, logprobs_of
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.formats import read_format
from edge_demo.server.protocol.messages import MOST_MESSAGES, as_turns, content_text
from edge_demo.server.protocol.request import GenerateRequest, Prompt
from edge_demo.server.protocol.settings import IGNORED, MOST_TOP, read_settings

_STATELESS = "this server keeps no conversations; send all messages in input"
_NO_TOOLS = "this server does not offer tools yet"
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text", "text")
_LOGPROBS = "message.output_text.logprobs"


def read_response_request(value: Any, vocabulary_size: int) -> GenerateRequest:
    """A request for a response.

    Args:
        value: the request's JSON.
        vocabulary_size: of the model.

    Raises:
        Refusal: a field is wrong, or cannot be honoured.
    """
    fields = Fields(value)
    fields.ignore((*IGNORED, "truncation", "max_tool_calls", "reasoning", "stream_options"))
    fields.refuse("previous_response_id", _STATELESS)
    fields.refuse("conversation", _STATELESS)
    fields.refuse("background", _STATELESS, harmless=(False,))
    fields.refuse("prompt", "this server keeps no prompts; send the text in input")
    fields.refuse("tools", _NO_TOOLS, harmless=([],))
    fields.refuse("tool_choice", _NO_TOOLS, harmless=("none", "auto"))
    fields.flag("parallel_tool_calls")
    text = fields.inner("text")
    form = None if text is None else read_format(text, "format")
    settings = read_settings(fields, ("max_output_tokens",), _top(fields), vocabulary_size, form)
    if settings.choices != 1:
        raise Refusal("a response is one answer; n must be 1", param="n")
    system, turns = as_turns(_messages(fields), "input")
    return GenerateRequest(
        model=fields.text("model"),
        prompts=(Prompt(turns=turns, system=system),),
        settings=settings,
        stream=bool(fields.flag("stream")),
        usage=True,
        unknown=fields.unknown,
    )


def _top(fields: Fields) -> int | None:
    include = fields.items("include", 16) or []
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    return top or 0 if _LOGPROBS in include or top else None


def _messages(fields: Fields) -> list[tuple[str, str]]:
    instructions = fields.text("instructions")
    messages = [("system", instructions)] if instructions else []
    value = fields.any("input")
    if isinstance(value, str):
        return [*messages, ("user", value)]
    items = fields.items("input", MOST_MESSAGES)
    if not items:
        raise fields.wrong("input", "text, or a list of messages")
    for number, item in enumerate(items):
        message = Fields(item, f"input[{number}]")
        kind = message.text("type") or "message"
        if kind == "reasoning":
            continue
        if kind != "message":
            raise Refusal(
                f"{message.where('type')}: {kind[:40]!r} is not supported yet",
                code="unsupported",
                param=message.where("type"),
            )
        role = message.choice("role", _ROLES)
        if role is None:
            raise message.wrong("role", " or ".join(map(repr, _ROLES)))
        messages.append((role, content_text(message, "content", _PARTS)))
    return messages


def _response(answer: Answer, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    usage = {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "model": answer.model,
        "output": output,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "temperature": None,
        "top_p": None,
        "previous_response_id": None,
        "store": False,
        "usage": None if status == "in_progress" else usage,
    }


def _item(answer: Answer, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(choice: Choice) -> dict[str, Any]:
    logprobs = [logprobs_of(token) for token in choice.logprobs or []]
    return {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": logprobs}


class ResponseForm:
    """One answer as a response."""

    named = True

    def __init__(self) -> None:
        self._number = -1
        self._said = Choice(0)

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole response."""
        choice = answer.choices[0]
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        return _response(answer, status, [_item(answer, status, [_part(choice)])])

    def begin(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """The response, its one message and the message's one part, all empty."""
        response = _response(answer, "in_progress", [])
        item = _item(answer, "in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event("response.output_item.added", output_index=0, item=item),
            self._of_part(answer, "response.content_part.added", part=_part(Choice(0))),
        ]

    def piece(self, answer: Answer, choice: Choice) -> list[dict[str, Any]]:
        """A piece of the text."""
        if not (choice.text or choice.logprobs):
            return []
        self._said.text += choice.text
        self._said.logprobs = (self._said.logprobs or []) + (choice.logprobs or [])
        more = {"delta": choice.text, "logprobs": _part(choice)["logprobs"]}
        return [self._of_part(answer, "response.output_text.delta", **more)]

    def end(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """All of them again, whole."""
        choice = answer.choices[0]
        choice.text, choice.logprobs = self._said.text, self._said.logprobs
        response, part = self.whole(answer), _part(choice)
        more = {"text": part["text"], "logprobs": part["logprobs"]}
        item = response["output"][0]
        return [
            self._of_part(answer, "response.output_text.done", **more),
            self._of_part(answer, "response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{response['status']}", response=response),
        ]

    def close(self, answer: Answer, usage: bool) -> list[dict[str, Any]]:
        """Nothing more."""
        return []

    def fail(self, answer: Answer, refusal: Refusal) -> list[dict[str, Any]]:
        """The error within a response."""
        response = _response(answer, "failed", [])
        response["error"] = {"code": refusal.code or "server_error", "message": str(refusal)}
        return [self._event("response.failed", response=response)]

    def _of_part(self, answer: Answer, kind: str, **more: Any) -> dict[str, Any]:
        item = f"msg_{answer.id}"
        return self._event(kind, item_id=item, output_index=0, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **more}
