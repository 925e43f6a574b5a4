"""`/v1/chat/completions`: requests, answers and the chunks of a stream.

After OpenAI's API reference, "Chat"; `timings` and `reasoning_content` as llama.cpp's server.
"""

from __future__ import annotations

from typing import Any

from edge_demo.server.protocol.answer import Answer, CallPiece, Choice, logprobs_of
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.server.protocol.formats import read_format
from edge_demo.server.protocol.messages import read_conversation
from edge_demo.server.protocol.request import GenerateRequest, Prompt, read_stream
from edge_demo.server.protocol.settings import IGNORED, MOST_TOP, read_settings
from edge_demo.server.protocol.tools import read_offer

_TEXT_ONLY = "this server answers with text only"
_OLD = "functions are given as tools"


def read_chat(value: Any, vocabulary_size: int) -> GenerateRequest:
    """A request for the answer to a conversation.

    Args:
        value: the request's JSON.
        vocabulary_size: of the model.

    Raises:
        Refusal: a field is wrong, or cannot be honoured.
    """
    fields = Fields(value)
    fields.ignore(IGNORED)
    fields.refuse("audio", _TEXT_ONLY)
    fields.refuse("modalities", _TEXT_ONLY, harmless=(["text"], []))
    fields.refuse("web_search_options", "this server does not search the web")
    fields.refuse("functions", _OLD, harmless=([],))
    fields.refuse("function_call", _OLD, harmless=("none", "auto"))
    offer = read_offer(fields)
    settings = read_settings(
        fields,
        ("max_completion_tokens", "max_tokens"),
        _top(fields),
        vocabulary_size,
        read_format(fields, offer),
    )
    system, turns = read_conversation(fields, offer)
    stream, usage = read_stream(fields)
    return GenerateRequest(
        model=fields.text("model"),
        prompts=(Prompt(turns=turns, system=system),),
        settings=settings,
        stream=stream,
        usage=usage,
        unknown=fields.unknown,
        offer=offer,
    )


def _top(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    if top and not wanted:
        raise Refusal("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (top or 0) if wanted else None


class ChatForm:
    """Answers as chat completions."""

    named = False

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The whole answer."""
        return {
            "id": f"chatcmpl-{answer.id}",
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [_whole(choice) for choice in answer.choices],
            "usage": answer.usage,
            "timings": answer.timings,
            "system_fingerprint": answer.fingerprint,
        }

    def begin(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """The role."""
        return [_chunk(answer, [_delta(index, {"role": "assistant", "content": ""})])]

    def piece(self, answer: Answer, choice: Choice) -> list[dict[str, Any]]:
        """A piece of the text, or of calls."""
        if not (choice.text or choice.logprobs or choice.calls):
            return []
        said = {"tool_calls": [_call_delta(call) for call in choice.calls]} if choice.calls else {}
        text = {} if choice.calls and not choice.text else {"content": choice.text}
        delta = _delta(choice.index, text | said)
        return [_chunk(answer, [delta | {"logprobs": _logprobs(choice)}])]

    def end(self, answer: Answer, index: int) -> list[dict[str, Any]]:
        """Why it ended."""
        reason = answer.choices[index].finish_reason
        return [_chunk(answer, [_delta(index, {}) | {"finish_reason": reason}])]

    def close(self, answer: Answer, usage: bool) -> list[dict[str, Any]]:
        """How many tokens there were."""
        if not usage:
            return []
        return [_chunk(answer, []) | {"usage": answer.usage, "timings": answer.timings}]

    def fail(self, answer: Answer, refusal: Refusal) -> list[dict[str, Any]]:
        """The error, which OpenAI's client raises."""
        return [refusal.body]


def _whole(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [_call(call) for call in choice.calls]
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _logprobs(choice),
        "finish_reason": choice.finish_reason,
    }


def _call(call: CallPiece) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_delta(piece: CallPiece) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.number, "function": {"arguments": piece.arguments}}
    return {"index": piece.number, **_call(piece)}


def _logprobs(choice: Choice) -> dict[str, Any] | None:
    if choice.logprobs is None:
        return None
    return {"content": [logprobs_of(token) for token in choice.logprobs], "refusal": None}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _chunk(answer: Answer, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.id}",
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "system_fingerprint": answer.fingerprint,
    }
