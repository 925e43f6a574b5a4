"""Calls as text: what the grammar allows, what the reader finds, what the prompt says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_demo.errors import EdgeError
from edge_demo.text.grammar import Grammars, GrammarSource
from edge_demo.text.json_numbers import MOST_DIGITS
from edge_demo.text.sampling import Sampler
from edge_demo.tool_calls import json_style
from edge_demo.tool_calls.call_reader import BegunCall, CallReader, SaidArguments, SaidText
from edge_demo.tool_calls.tool import Call, Offer, Result, Tool
from tests.edge_demo.conftest import generator

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/name"}}, "required": ["city"]}
CITY |= {"additionalProperties": False, "$defs": {"name": {"type": "string", "maxLength": 9}}}
NUMBERS = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
NUMBERS |= {"additionalProperties": False}
WEATHER = Tool("weather", "Tells the weather.", CITY)
ROOT = Tool("square-root_2", "", NUMBERS)
TOOLS = (WEATHER, ROOT)
PARIS = '{"name": "weather", "parameters": {"city": "Paris"}}'
NINE = '{"name": "square-root_2", "parameters": {"a": 9}}'


def offer(allowed=TOOLS, required=False, several=True):
    return Offer(TOOLS, allowed, required, several)


@pytest.fixture(scope="module")
def chat(tiny_bundles):
    return generator(tiny_bundles / "chat")


@pytest.fixture(scope="module")
def grammars(chat):
    return Grammars(chat.tokenizer, chat.engine.bundle.vocabulary_size)


@pytest.fixture(scope="module")
def allows(chat, grammars):
    def allowed(text, source):
        """`no`, `begun` or `whole`."""
        grammar = grammars.compile(source)
        try:
            for token in chat.tokenizer.encode(text, bos=False):
                grammar.take(token)
            grammar.take(chat.tokenizer.spec.stop[0])
        except EdgeError:
            return False
        return True

    return allowed


def said(text, names=("weather", "square-root_2")):
    """Text and calls, read at once."""
    return joined([*(reader := CallReader(names)).push(text), *reader.finish()])


def joined(found):
    text, calls = "", []
    for one in found:
        if isinstance(one, SaidText):
            text += one.text
        elif isinstance(one, BegunCall):
            calls.append(Call(one.name, ""))
        else:
            assert isinstance(one, SaidArguments)
            calls[-1] = Call(calls[-1].name, calls[-1].arguments + one.text)
    return text, calls


P, N = Call("weather", '{"city": "Paris"}'), Call("square-root_2", '{"a": 9}')
ANSWERS = [
    ("Hello there", []),
    ("", []),
    ("{", []),
    ('{"n', []),
    ('{"x": 1}', []),
    ("[1, 2]", []),
    ('```json\n{"x": 1}\n```', []),
    ("```python\nprint()\n```", []),
    ('I call {"name": "weather"}', []),
    ('[{"name": "Ada", "age": 36}]', []),
    ('{"name": "weathering", "parts": 2}', []),
    (PARIS, [P]),
    (NINE, [N]),
    (f"[{PARIS}]", [P]),
    (f"[{PARIS}, {NINE}, {PARIS}]", [P, N, P]),
    (f"```json\n{PARIS}\n```", [P]),
    (f"```tool_code\n{NINE}\n```", [N]),
    (f"```\n[{NINE}, {PARIS}]\n```", [N, P]),
]


@pytest.mark.parametrize(("text", "calls"), ANSWERS)
def test_answers_are_a_text_or_calls(text, calls, allows):
    assert allows(text, json_style.grammar(offer()))
    assert said(text) == ("" if calls else text, calls)
    assert allows(text, json_style.grammar(offer(required=True))) == bool(calls)
    one = json_style.grammar(offer(several=False))
    assert allows(text, one) == (not calls or "[" not in text)
    only = json_style.grammar(offer(allowed=(ROOT,)))
    assert allows(text, only) == all(call.name == ROOT.name for call in calls)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "rain", "parameters": {}}',
        '{"name":"weather"}',
        '{"name": "rain", "parameters": 3}',
        '{"name": "weather", "age": 3}',
        '{ "name": "weather", "parameters": {"city": "Paris"}}',
        '{"name": "weather", "parameters": {"town": "Paris"}}',
        '{"name": "weather", "parameters": {"city": "A very long name"}}',
        f"{PARIS} and more",
        f"{PARIS}, {NINE}",
        f"```json\n{PARIS}",
        f"[{', '.join([NINE] * (json_style.MOST_CALLS + 1))}]",
    ],
)
def test_what_begins_as_a_call_must_be_one(text, allows):
    assert not allows(text, json_style.grammar(offer()))


def test_a_form_beside_calls(allows):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    schema |= {"additionalProperties": False}
    source = json_style.grammar(offer(), GrammarSource("json_schema", json.dumps(schema)))
    assert allows('{"x": 3}', source) and allows(PARIS, source)
    assert not allows("Hello", source) and not allows('{"y": 3}', source)


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 60), max_size=6))
def test_a_stream_says_the_same_wherever_it_is_cut(answer, cuts):
    text, _ = answer
    reader, found, before = CallReader(["weather", "square-root_2"]), [], 0
    for cut in [*sorted(cut for cut in cuts if cut <= len(text)), len(text)]:
        found += reader.push(text[before:cut])
        before = cut
    assert joined([*found, *reader.finish()]) == said(text)


@given(st.dictionaries(st.text(), st.recursive(st.text() | st.integers(), st.lists)))
def test_arguments_come_back_as_they_were(arguments):
    written = json.dumps(arguments, ensure_ascii=False)
    calls = [Call("weather", written), Call("weather", "{}")]
    assert said(json_style.call_text(calls)) == ("", calls)
    assert said(json_style.call_text(calls[:1])) == ("", calls[:1])


@pytest.mark.parametrize("seed", range(8))
def test_a_random_model_calls_what_it_has(chat, grammars, seed):
    several = seed < 3  # the context is small
    grammar = grammars.compile(json_style.grammar(offer(required=True, several=several)))
    ids = chat.tokenizer.encode("Tell me.")
    stream = chat.stream(ids, Sampler(temperature=1.0, seed=seed), 1500, grammar=grammar)
    text, calls = said("".join(piece.text for piece in stream))
    assert text == "" and 1 <= len(calls) <= json_style.MOST_CALLS
    assert stream.completion.finish_reason == "stop"
    for call in calls:
        found = json.loads(call.arguments)
        assert list(found) == [next(iter(TOOL_FIELDS[call.name]))]
        if call.name == ROOT.name:
            assert (
                len(call.arguments) <= len('{"a": e-1}') + MOST_DIGITS + 8
            )  # a token may have several


TOOL_FIELDS = {tool.name: tool.parameters["properties"] for tool in TOOLS}


def test_the_prompt_lists_the_tools_in_the_documented_words():
    text = json_style.instructions(offer())
    assert text.startswith("You have access to functions. If you decide to invoke any")
    assert json.loads(text[text.rindex("\n[\n") :]) == [
        {"name": "weather", "description": "Tells the weather.", "parameters": CITY},
        {"name": "square-root_2", "parameters": NUMBERS},
    ]
    assert "several functions" not in json_style.instructions(offer(several=False))


@pytest.mark.parametrize("content", ['{"sky": "clear"}', "clear", '"', "3", "[1"])
def test_results_are_json_in_a_block(content):
    text = json_style.result_text(Result("weather", content))
    begin, end = "```tool_output\n", "\n```"
    assert text.startswith(begin) and text.endswith(end)
    found = json.loads(text.removeprefix(begin).removesuffix(end))
    try:
        expected = json.loads(content)
    except ValueError:
        expected = content
    assert found == {"name": "weather", "result": expected}
