"""The form that an answer is to have: `response_format`, or `text.format` of a response."""

from __future__ import annotations

import json

from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.fields import Fields
from edge_demo.text.grammar import LONGEST, GrammarSource
from edge_demo.tool_calls import json_style
from edge_demo.tool_calls.tool import Offer

_ANY_OBJECT = GrammarSource("json_schema", '{"type": "object"}')
_KINDS = ("text", "json_object", "json_schema", "regex", "lark")


def read_format(
    fields: Fields, offer: Offer | None = None, name: str = "response_format"
) -> GrammarSource | None:
    """The form that is asked for, with calls of tools; `None` for any text.

    Beside OpenAI's forms there are `{"type": "regex", "regex": TEXT}` and `{"type": "lark",
    "lark": TEXT}`.

    Args:
        fields: of the request, or of what holds the form.
        offer: of tools that the answer may call.
        name: of the field.

    Raises:
        Refusal: it is none of them, or too large.
    """
    form = _read(fields, name)
    if offer is None:
        return form
    if form is not None and form.kind != "json_schema":
        where = fields.where(name)
        raise Refusal(
            f"{where} can be text or JSON beside tools, not {form.kind}",
            code="unsupported",
            param=where,
        )
    return json_style.grammar(offer, form)


def _read(fields: Fields, name: str) -> GrammarSource | None:
    form = fields.inner(name)
    if form is None:
        return None
    kind = form.choice("type", _KINDS)
    if kind is None:
        raise form.wrong("type", " or ".join(map(repr, _KINDS)))
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    if kind == "json_schema":
        inner = form.inner("json_schema") or form  # a response has it without the object between
        schema = inner.schema("schema", LONGEST)
        if schema is None:
            raise inner.wrong("schema", "a JSON schema")
        text = json.dumps(schema, ensure_ascii=False)
        return GrammarSource("json_schema", text)
    text = form.text(kind, LONGEST)
    if not text:
        raise form.wrong(kind, "text")
    return GrammarSource("regex" if kind == "regex" else "lark", text)
