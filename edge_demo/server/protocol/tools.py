"""Reads tools, the choice among them, and the calls and results of earlier turns."""

from __future__ import annotations

import json
import re
from typing import Any

from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.text.grammar import LONGEST
from edge_demo.tool_calls.tool import Call, Offer, Tool

MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_TEXT = "1 to 64 letters, digits, _ and -"
_MODES = ("none", "auto", "required")
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def read_offer(fields: Fields, flat: bool = False) -> Offer | None:
    """The tools that an answer may call; `None` if it may call none.

    Args:
        fields: of the request.
        flat: whether a tool has its name beside its type, as in `/v1/responses`.

    Raises:
        Refusal: a tool or the choice is not valid.
    """
    tools = tuple(
        _tool(Fields(value, f"tools[{number}]"), flat)
        for number, value in enumerate(fields.items("tools", MOST_TOOLS) or [])
    )
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Refusal(f"tools has {twice!r} twice", param="tools")
    size = sum(len(json.dumps(tool.parameters)) for tool in tools)
    if size > LONGEST:
        raise Refusal(
            f"the parameters of tools have {size:,} characters; the limit is {LONGEST:,}",
            param="tools",
        )
    several = fields.flag("parallel_tool_calls") is not False
    mode, allowed = _choice(fields, tools, flat)
    if mode == "none" or not allowed:
        return None
    if mode == "named":  # as OpenAI: then there is one call
        return Offer(tools, allowed, required=True, several=False)
    return Offer(tools, allowed, mode == "required", several)


def _tool(fields: Fields, flat: bool) -> Tool:
    kind = fields.any("type")
    if kind != "function":
        where = fields.where("type")
        raise Refusal(
            f"{where} is {str(kind)[:40]!r}; this server takes functions only",
            code="unsupported",
            param=where,
        )
    function = fields if flat else fields.inner("function")
    if function is None:
        raise fields.wrong("function", "an object with a name")
    parameters = function.schema("parameters", LONGEST) or _NO_ARGUMENTS
    if parameters.get("type", "object") != "object":
        raise function.wrong("parameters", "the JSON schema of an object")
    function.flag("strict")  # they always are
    description = function.text("description", LONGEST) or ""
    return Tool(_name(function), description, {"type": "object", **parameters})


def _name(fields: Fields) -> str:
    name = fields.text("name")
    if name is None or not _NAME.fullmatch(name):
        raise fields.wrong("name", _NAME_TEXT)
    return name


def _choice(fields: Fields, tools: tuple[Tool, ...], flat: bool) -> tuple[str, tuple[Tool, ...]]:
    """Whether a tool may or must be called, and which."""
    value = fields.any("tool_choice")
    if value is None or isinstance(value, str):
        mode = fields.choice("tool_choice", _MODES) or "auto"
        if mode == "required" and not tools:
            raise Refusal("tool_choice is 'required', but there are no tools", param="tool_choice")
        return mode, tools
    choice = Fields(value, "tool_choice")
    kind = choice.choice("type", ("function", "allowed_tools"))
    if kind is None:
        raise choice.wrong("type", "'function' or 'allowed_tools'")
    if kind == "function":
        return "named", _named([_chosen(choice, flat)], tools)
    inner = choice if flat else choice.inner("allowed_tools") or choice
    mode = inner.choice("mode", _MODES[1:]) or "auto"
    listed = inner.items("tools", MOST_TOOLS)
    if not listed:
        raise inner.wrong("tools", "a list of at least one tool")
    chosen = [
        _chosen(Fields(one, f"{inner.where('tools')}[{number}]"), flat)
        for number, one in enumerate(listed)
    ]
    return mode, _named(chosen, tools)


def _chosen(fields: Fields, flat: bool) -> str:
    function = fields if flat else fields.inner("function")
    return _name(function if function is not None else fields)


def _named(names: list[str], tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    unknown = next((name for name in names if name not in {t.name for t in tools}), None)
    if unknown is not None:
        raise Refusal(f"tool_choice has {unknown!r}, which is not in tools", param="tool_choice")
    return tuple(tool for tool in tools if tool.name in names)


def read_call(function: Fields) -> Call:
    """A call of an earlier turn.

    Args:
        function: the object with its name and arguments.

    Raises:
        Refusal: the arguments are not the JSON of an object.
    """
    arguments = function.text("arguments", LONGEST)
    try:
        valid = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise function.wrong("arguments", "the JSON of an object, as text")
    return Call(_name(function), arguments or "{}")
