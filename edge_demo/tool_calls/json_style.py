"""Tool calls as text, for models without tokens for them: Gemma 1 to 3.

The words are those of "Function calling with Gemma" (ai.google.dev/gemma/docs/capabilities/
function-calling), in its JSON form. Several calls are a list, which is our addition. Results
stand in a block named `tool_output`, as Google's examples for Gemma 3 have them.

A grammar lets the model write either a text or calls of the tools that it may call. A text may
not begin with `{"name": "` and a tool's name, so what begins as a call is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from edge_demo.text.grammar import GrammarSource
from edge_demo.tool_calls.tool import Call, Offer, Result, Tool

MOST_CALLS = 8  # of one answer
CALL_SEPARATOR = ", "
# Models put JSON into such blocks, whatever they are asked.
FENCES = ("```json\n", "```tool_code\n", "```tool_call\n", "```\n")
FENCE_END = "\n```"

_RULES = (
    "You have access to functions. If you decide to invoke any of the function(s), "
    "you MUST put it in the format of\n"
    '{"name": function name, "parameters": dictionary of argument name and its value}\n\n'
)
_SEVERAL = (
    "To invoke several functions at once, put them in a list:\n"
    '[{"name": ..., "parameters": ...}, {"name": ..., "parameters": ...}]\n\n'
)
_ALONE = "You SHOULD NOT include any other text in the response if you call a function\n"
# As `edge_demo.text.grammar` has answers of JSON written.
_GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def instructions(offer: Offer) -> str:
    """What a system text says of the tools."""
    listed = [_declaration(tool) for tool in offer.tools]
    several = _SEVERAL if offer.several else ""
    return f"{_RULES}{several}{_ALONE}{json.dumps(listed, ensure_ascii=False, indent=2)}"


def _declaration(tool: Tool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **described, "parameters": tool.parameters}


def call_text(calls: Iterable[Call]) -> str:
    """Calls as the model writes them."""
    written = [f"{head(call.name)}{call.arguments}}}" for call in calls]
    return written[0] if len(written) == 1 else f"[{CALL_SEPARATOR.join(written)}]"


def result_text(result: Result) -> str:
    """What a call returned, as a user's turn tells it."""
    try:
        json.loads(result.content)
        content = result.content
    except (ValueError, RecursionError):
        content = json.dumps(result.content, ensure_ascii=False)
    return f'```tool_output\n{{"name": {json.dumps(result.name)}, "result": {content}}}\n```'


def head(name: str) -> str:
    """A call's text before its arguments."""
    return f'{{"name": {json.dumps(name)}, "parameters": '


def grammar(offer: Offer, answer: GrammarSource | None = None) -> GrammarSource:
    """What an answer may be: calls of allowed tools, or else a text unless a call is required.

    Each beginning is one lexeme: llguidance's lexer takes the longest, and a text may begin with
    the same characters.

    Args:
        offer: of the answer.
        answer: the form of a text, a JSON schema; `None` for any text that is no call.
    """
    if answer is not None and not offer.required:
        return _calls_or_json(offer, answer)
    calls = []
    rules = []
    fences = "|".join(fence[3:-1] for fence in FENCES)
    for number, tool in enumerate(offer.allowed):
        schema = {**tool.parameters, "x-guidance": _GUIDANCE}
        begin = head(tool.name)
        rules += [
            f"args_{number}: %json {json.dumps(schema, ensure_ascii=False)}",
            f"FENCED_{number}: /```({fences})\\n/ {json.dumps(begin)}",
        ]
        rest = f'args_{number} "}}"'
        calls += [f"{json.dumps(begin)} {rest}", f'FENCED_{number} {rest[:-1]}\\n```"']
        if offer.several:
            rules += [
                f"FENCED_LIST_{number}: /```({fences})\\n/ {json.dumps('[' + begin)}",
                f"next_{number}: {json.dumps(CALL_SEPARATOR + begin)} {rest}",
            ]
            calls += [
                f'{json.dumps("[" + begin)} {rest} others "]"',
                f'FENCED_LIST_{number} {rest} others "]\\n```"',
            ]
    if offer.several:
        following = " | ".join(f"next_{number}" for number in range(len(offer.allowed)))
        rules.append(f"others: ({following}){{0,{MOST_CALLS - 1}}}")
    rules.append(f"calls: {' | '.join(calls)}")
    if offer.required:
        start = "start: calls"
    else:
        start = "start: calls | TEXT"
        rules.append(f"TEXT: {_no_call(offer)}")
    return GrammarSource("lark", "\n".join([start, *rules]) + "\n", json=True)


def _no_call(offer: Offer) -> str:
    """Any text but one that begins as a call, of a tool or of what has a tool's form."""
    names = "|".join(tool.name for tool in offer.tools)  # which have no special characters
    begin = r"""\s*(```[a-z_]*\n)?\s*(\[\s*)?\{\s*"name"\s*:\s*"""
    of_a_tool = rf'~/{begin}"({names})"(?s:.*)/'
    of_its_form = rf'~/{begin}"[^"]*"\s*,\s*"parameters"(?s:.*)/'
    return f"/(?s:.*)/ & {of_a_tool} & {of_its_form}"


def _calls_or_json(offer: Offer, answer: GrammarSource) -> GrammarSource:
    """One schema of calls and of the answer's form, each among its definitions."""
    schemas = {f"tool_{n}": tool.parameters for n, tool in enumerate(offer.allowed)}
    schemas["answer"] = json.loads(answer.text)
    calls = {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.name},
                    "parameters": {"$ref": f"#/$defs/tool_{number}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for number, tool in enumerate(offer.allowed)
        ]
    }
    several = {"type": "array", "items": calls, "minItems": 1, "maxItems": MOST_CALLS}
    one_of = [calls, *([several] if offer.several else []), {"$ref": "#/$defs/answer"}]
    moved = {name: _moved(schema, f"#/$defs/{name}") for name, schema in schemas.items()}
    return GrammarSource("json_schema", json.dumps({"$defs": moved, "anyOf": one_of}))


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself find it at another place."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
