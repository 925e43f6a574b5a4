"""`/v1/responses`, without memory: each request brings its whole conversation.

After OpenAI's API reference, "Responses". A stream has named events with numbers in sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from edge_demo.server.protocol.answer import Answer, CallPiece, Choice, logprobs_of
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.formats import read_format
from edge_demo.server.protocol.messages import (
    MOST_MESSAGES,
    KnownCalls,
    Message,
    as_turns,
    content_text,
)
from edge_demo.server.protocol.request import GenerateRequest, Prompt
from edge_demo.server.protocol.settings import IGNORED, MOST_TOP, read_settings
from edge_demo.server.protocol.tools import read_call, read_offer

_STATELESS = "this server keeps no conversations; send all messages in input"
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text", "text")
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
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
    offer = read_offer(fields, flat=True)
    form = read_format(fields.inner("text") or Fields({}, "text"), offer, "format")
    settings = read_settings(fields, ("max_output_tokens",), _top(fields), vocabulary_size, form)
    if settings.choices != 1:
        raise Refusal("a response is one answer; n must be 1", param="n")
    system, turns = as_turns(_messages(fields), "input", offer)
    return GenerateRequest(
        model=fields.text("model"),
        prompts=(Prompt(turns=turns, system=system),),
        settings=settings,
        stream=bool(fields.flag("stream")),
        usage=True,
        unknown=fields.unknown,
        offer=offer,
    )


def _top(fields: Fields) -> int | None:
    include = fields.items("include", 16) or []
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    return top or 0 if _LOGPROBS in include or top else None


def _messages(fields: Fields) -> list[Message]:
    instructions = fields.text("instructions")
    messages = [Message("system", instructions)] if instructions else []
    value = fields.any("input")
    if isinstance(value, str):
        return [*messages, Message("user", value)]
    items = fields.items("input", MOST_MESSAGES)
    if not items:
        raise fields.wrong("input", "text, or a list of messages")
    known = KnownCalls()
    for number, item in enumerate(items):
        message = _message(Fields(item, f"input[{number}]"), known)
        if message is not None:
            messages.append(message)
    return messages


def _message(item: Fields, known: KnownCalls) -> Message | None:
    kind = item.text("type") or "message"
    if kind == "reasoning":
        return None
    if kind == "function_call":
        return Message("assistant", "", (known.add(item, "call_id", read_call(item)),))
    if kind == "function_call_output":
        return known.result(item, "call_id", content_text(item, "output", _PARTS))
    if kind != "message":
        raise Refusal(
            f"{item.where('type')}: {kind[:40]!r} is not supported yet",
            code="unsupported",
            param=item.where("type"),
        )
    role = item.choice("role", _ROLES)
    if role is None:
        raise item.wrong("role", " or ".join(map(repr, _ROLES)))
    return Message(role, content_text(item, "content", _PARTS))


def _response(answer: Answer, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    usage = {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    reason = _INCOMPLETE.get(answer.choices[0].finish_reason or "")
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "model": answer.model,
        "output": output,
        "error": None,
        "incomplete_details": {"reason": reason} if status == "incomplete" else None,
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


def _call_item(call: CallPiece, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _part(choice: Choice) -> dict[str, Any]:
    logprobs = [logprobs_of(token) for token in choice.logprobs or []]
    return {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": logprobs}


class ResponseForm:
    """One answer as a response: a message, or calls of tools."""

    named = True

    def __init__(self) -> None:
        self._number = -1
        self._said = Choice(0)
        self._open = False  # whether the message was begun

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole response."""
        choice = answer.choices[0]
        status = "incomplete" if choice.finish_reason in _INCOMPLETE else "completed"
        return _response(answer, status, _output(answer, choice, status))

    def begin(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """The response, without items."""
        response = _response(answer, "in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def piece(self, answer: Answer, choice: Choice) -> list[dict[str, Any]]:
        """A piece of the text, or of calls; whatever is new begins with an empty item."""
        shown: list[dict[str, Any]] = []
        self._said.logprobs = (self._said.logprobs or []) + (choice.logprobs or [])
        if choice.text or (choice.logprobs and self._open):
            shown += self._begin_message(answer)
            self._said.text += choice.text
            more = {"delta": choice.text, "logprobs": _part(choice)["logprobs"]}
            shown.append(self._of_part(answer, "response.output_text.delta", **more))
        for piece in choice.calls:
            if piece.name is not None:
                shown += self._end_call()
                self._said.calls.append(dataclasses.replace(piece))
                item = _call_item(piece, "in_progress")
                place = piece.number
                shown.append(
                    self._event("response.output_item.added", output_index=place, item=item)
                )
            if piece.arguments:
                self._said.calls[-1].arguments += piece.arguments
                shown.append(self._of_call("delta", delta=piece.arguments))
        return shown

    def end(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """All of it again, whole."""
        choice = answer.choices[0]
        choice.text, choice.logprobs = self._said.text, self._said.logprobs
        choice.calls = self._said.calls
        response = self.whole(answer)
        shown = self._end_call(response["output"][-1]["status"])
        if not choice.calls:
            shown += self._begin_message(answer)
            part = _part(choice)
            more = {"text": part["text"], "logprobs": part["logprobs"]}
            item = response["output"][0]
            shown += [
                self._of_part(answer, "response.output_text.done", **more),
                self._of_part(answer, "response.content_part.done", part=part),
                self._event("response.output_item.done", output_index=0, item=item),
            ]
        return [*shown, self._event(f"response.{response['status']}", response=response)]

    def close(self, answer: Answer, usage: bool) -> list[dict[str, Any]]:
        """Nothing more."""
        return []

    def fail(self, answer: Answer, refusal: Refusal) -> list[dict[str, Any]]:
        """The error within a response."""
        response = _response(answer, "failed", [])
        response["error"] = {"code": refusal.code or "server_error", "message": str(refusal)}
        return [self._event("response.failed", response=response)]

    def _begin_message(self, answer: Answer) -> list[dict[str, Any]]:
        """The message and its one part, both empty, unless they were begun."""
        if self._open:
            return []
        self._open = True
        item = _item(answer, "in_progress", [])
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._of_part(answer, "response.content_part.added", part=_part(Choice(0))),
        ]

    def _end_call(self, status: str = "completed") -> list[dict[str, Any]]:
        """The call that was begun last, whole."""
        if not self._said.calls:
            return []
        call = self._said.calls[-1]
        item = _call_item(call, status)
        return [
            self._of_call("done", arguments=call.arguments, name=call.name),
            self._event("response.output_item.done", output_index=call.number, item=item),
        ]

    def _of_call(self, kind: str, **more: Any) -> dict[str, Any]:
        call = self._said.calls[-1]
        kind = f"response.function_call_arguments.{kind}"
        return self._event(kind, item_id=f"fc_{call.id}", output_index=call.number, **more)

    def _of_part(self, answer: Answer, kind: str, **more: Any) -> dict[str, Any]:
        item = f"msg_{answer.id}"
        return self._event(kind, item_id=item, output_index=0, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **more}


def _output(answer: Answer, choice: Choice, status: str) -> list[dict[str, Any]]:
    """The items of an answer; only the last may be incomplete."""
    if not choice.calls:
        return [_item(answer, status, [_part(choice)])]
    *before, last = choice.calls
    return [*(_call_item(call, "completed") for call in before), _call_item(last, status)]
