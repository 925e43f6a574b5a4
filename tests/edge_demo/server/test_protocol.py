"""Requests as clients send them, and as they should not."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.server.protocol.chat import read_chat
from edge_demo.server.protocol.completions import read_completion
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.responses import read_response_request
from edge_demo.server.protocol.texts import (
    read_apply_template,
    read_detokenize,
    read_tokenize,
)

VOCABULARY = 1000
HELLO = [{"role": "user", "content": "Hello"}]


ADD = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
DEEP = functools.reduce(lambda inner, _: {"not": inner}, range(65), {})
MUL = {"type": "function", "function": {"name": "mul", "parameters": {"type": "object"}}}


def chat(**fields):
    return read_chat({"messages": HELLO, **fields}, VOCABULARY)


def test_a_bare_chat_gets_what_gemma_recommends():
    found = chat()
    assert found.prompts[0].turns == (("user", "Hello"),) and found.prompts[0].system == ""
    sampler = found.settings.sampler()
    assert (sampler.temperature, sampler.top_k, sampler.top_p) == (1.0, 64, 0.95)
    assert found.settings.max_tokens is None and found.settings.top is None
    assert (found.model, found.stream, found.usage, found.unknown) == (None, False, False, 0)


def test_every_setting_arrives():
    found = chat(
        model="gemma", temperature=0.5, top_k=7, top_p=0.8, min_p=0.1, seed=3, n=2,
        presence_penalty=1, frequency_penalty=-1, repeat_penalty=1.2, repeat_last_n=5,
        max_tokens=9, max_completion_tokens=8, stop=["a", "b"], logit_bias={"5": -100},
        logprobs=True, top_logprobs=4, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    sampler = found.settings.sampler(1)
    assert (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p) == (0.5, 7, 0.8, 0.1)
    assert (sampler.presence_penalty, sampler.frequency_penalty) == (1, -1)
    assert (sampler.repeat_penalty, sampler.repeat_last_n, sampler.seed) == (1.2, 5, 4)
    assert (found.settings.max_tokens, found.settings.stop) == (8, ("a", "b"))
    assert found.settings.bias.lowered == 1 and found.settings.top == 4
    assert found.stream and found.usage and found.settings.choices == 2


@pytest.mark.parametrize("name", ["temperature", "stop", "seed", "tools", "max_tokens", "n"])
def test_null_is_as_good_as_absent(name):
    assert chat(**{name: None}).settings == chat().settings


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 101}, {"temperature": "1"}, {"temperature": True}, {"top_p": 0},
        {"top_k": -1}, {"top_k": 1.5}, {"min_p": 2}, {"presence_penalty": 3}, {"seed": 2**64},
        {"repeat_penalty": 0}, {"repetition_penalty": 11}, {"repeat_last_n": -2},
        {"max_tokens": 0}, {"max_completion_tokens": "9"}, {"n": 5}, {"n": 0},
        {"stop": ["a", "b", "c", "d", "e"]}, {"stop": [1]}, {"stop": ""}, {"stop": "x" * 201},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"1000": 1}}, {"logit_bias": {"1": 101}},
        {"logit_bias": [1]}, {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21},
        {"logprobs": 1}, {"stream": "yes"}, {"stream_options": True}, {"model": 3},
        {"messages": []}, {"messages": None}, {"messages": "Hello"}, {"messages": ["Hello"]},
        {"messages": [{"role": "user"}]}, {"messages": [{"content": "x"}]},
        {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [*HELLO, {"role": "system", "content": "x"}]},
        {"messages": [*HELLO, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": HELLO * 3000},
        {"tools": [{}]}, {"tool_choice": "required"}, {"functions": [{}]},
        {"tools": [{"type": "retrieval"}]}, {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]},
        {"tools": [{"type": "function", "function": {"name": "a"}}] * 2},
        {"tools": [{"type": "function", "function": {"name": "a"}}] * 129},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": "y" * 70000}}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": DEEP}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
        {"tools": ADD, "tool_choice": "perhaps"}, {"tools": ADD, "tool_choice": {"type": "x"}},
        {"tools": ADD, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
        {"tools": ADD, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
        {"tools": ADD, "parallel_tool_calls": "no"},
        {"tools": ADD, "response_format": {"type": "regex", "regex": "a"}},
        {"messages": [*HELLO, {"role": "tool", "tool_call_id": "c", "content": "3"}]},
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "c"}]}]},
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [
            {"id": "c", "function": {"name": "add", "arguments": "[1]"}}]}]},
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [
            {"function": {"name": "add", "arguments": "{}"}}]}]},
        {"response_format": {"type": "xml"}}, {"response_format": "json"},
        {"response_format": {"type": "json_schema"}}, {"response_format": {}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        {"response_format": {"type": "regex"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 70000}}}},
        {"modalities": ["audio"]}, {"audio": {}}, {"web_search_options": {}},
    ],
)  # fmt: skip
def test_what_is_wrong_or_cannot_be_honoured_is_refused_by_name(fields):
    with pytest.raises(Refusal) as found:
        chat(**fields)
    assert found.value.status == 400
    assert found.value.param.partition(".")[0].partition("[")[0] in fields
    assert len(str(found.value)) < 400


@pytest.mark.parametrize(
    ("choice", "allowed", "required", "several"),
    [
        (None, "add mul", False, True),
        ("auto", "add mul", False, True),
        ("required", "add mul", True, True),
        ({"type": "function", "function": {"name": "mul"}}, "mul", True, False),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "add"}}],
                },
            },
            "add",
            True,
            True,
        ),
    ],
)
def test_a_choice_of_tools(choice, allowed, required, several):
    found = chat(tools=[*ADD, MUL], tool_choice=choice)
    assert [tool.name for tool in found.offer.tools] == ["add", "mul"]
    assert " ".join(tool.name for tool in found.offer.allowed) == allowed
    assert (found.offer.required, found.offer.several) == (required, several)
    assert '"description": "Adds."' in found.prompts[0].system and found.unknown == 0
    assert found.settings.grammar.is_json
    one = chat(tools=[*ADD, MUL], tool_choice=choice, parallel_tool_calls=False)
    assert not one.offer.several


def test_arguments_are_an_object_also_beside_a_form():
    bare = {"type": "function", "function": {"name": "a", "parameters": {"title": "A"}}}
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    found = chat(tools=[bare], response_format=form).settings.grammar
    assert json.loads(found.text)["$defs"]["tool_0"] == {"type": "object", "title": "A"}


def test_a_deep_result_is_text():
    messages = [*CALL_MESSAGES[:-1], {**CALL_MESSAGES[-1], "content": "[" * 100_000}]
    assert chat(messages=messages).prompts[0].turns[-1][1].count("[") == 100_000


def test_no_tools_may_be_called():
    found = chat(tools=ADD, tool_choice="none")
    assert found.offer is None and found.settings.grammar is None
    assert found.prompts[0].system == ""


CALL_MESSAGES = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
            {"id": "c2", "type": "function", "function": {"name": "mul", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "two"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]
CALL_ITEMS = [
    {"role": "user", "content": "Hello"},
    {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":1}'},
    {"type": "function_call", "call_id": "c2", "name": "mul", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c2", "output": "two"},
    {
        "type": "function_call_output",
        "call_id": "c1",
        "output": [{"type": "input_text", "text": "3"}],
    },
]


def test_calls_and_their_results_are_turns_as_the_model_wrote_and_reads_them():
    expected = (
        ("user", "Hello"),
        (
            "model",
            '[{"name": "add", "parameters": {"a":1}}, {"name": "mul", "parameters": {}}]',
        ),
        (
            "user",
            '```tool_output\n{"name": "mul", "result": "two"}\n```\n\n'
            '```tool_output\n{"name": "add", "result": 3}\n```',
        ),
    )
    assert chat(messages=CALL_MESSAGES).prompts[0].turns == expected
    found = read_response_request({"input": CALL_ITEMS}, VOCABULARY)
    assert found.prompts[0].turns == expected
    flat = [{"type": "function", "name": "add", "description": "Adds."}]
    named = {"type": "function", "name": "add"}
    found = read_response_request({"input": "Hi", "tools": flat, "tool_choice": named}, VOCABULARY)
    assert found.offer == chat(tools=ADD, tool_choice=MUL | {"function": {"name": "add"}}).offer


def test_messages_of_one_role_are_one_turn_and_parts_are_one_text():
    found = read_chat(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
                {"role": "user", "content": "One"},
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("T", "wo")]},
                {
                    "role": "assistant",
                    "content": "Yes",
                    "reasoning_content": "Hm",
                    "tool_calls": [],
                },
                {"role": "user", "content": "Three", "name": "Ada"},
            ]
        },
        VOCABULARY,
    )
    assert found.prompts[0].system == "Be brief.\n\nBe kind."
    assert found.prompts[0].turns == (("user", "One\n\nTwo"), ("model", "Yes"), ("user", "Three"))


def test_hints_are_ignored_and_what_nobody_knows_is_counted():
    assert chat(user="me", store=False, reasoning_effort="low", metadata={}).unknown == 0
    assert chat(frobnicate=1, wobble=None).unknown == 2


def test_the_form_of_an_answer():
    def grammar(**form):
        found = chat(response_format=form).settings.grammar
        return found and (found.kind, found.text)

    schema = {"type": "object", "properties": {"né": {}}}
    named = {"name": "a", "strict": True, "schema": schema}
    assert grammar(type="text") is None
    assert grammar(type="json_object") == ("json_schema", '{"type": "object"}')
    assert grammar(type="json_schema", json_schema=named)[1] == json.dumps(
        schema, ensure_ascii=False
    )
    assert grammar(type="regex", regex="a+") == ("regex", "a+")
    assert grammar(type="lark", lark="start: x") == ("lark", "start: x")
    flat = {"input": "Hello", "text": {"format": {"type": "json_schema", **named}}}
    assert read_response_request(flat, VOCABULARY).settings.grammar.kind == "json_schema"


def test_prompts_of_completions_are_texts_or_tokens():
    def prompts(value):
        return [(p.text, p.ids) for p in read_completion({"prompt": value}, VOCABULARY).prompts]

    assert prompts("Once") == [("Once", ())]
    assert prompts(["a", "b"]) == [("a", ()), ("b", ())]
    assert prompts([2, 5]) == [("", (2, 5))]
    assert prompts([[2], [3, 4]]) == [("", (2,)), ("", (3, 4))]
    for wrong in (None, [], 3, [2, "a"], [[]], [1000], [-1], ["a"] * 17, [True]):
        with pytest.raises(Refusal, match="prompt"):
            prompts(wrong)


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"echo": True}, {"best_of": 3}])
def test_completions_refuse_what_they_do_not_do(fields):
    with pytest.raises(Refusal):
        read_completion({"prompt": "a", **fields}, VOCABULARY)


def test_a_response_brings_its_conversation():
    found = read_response_request(
        {
            "instructions": "Be brief.", "max_output_tokens": 5, "store": True,
            "input": [
                {"role": "user", "content": "One"},
                {"type": "message", "role": "assistant", "id": "msg_1",
                 "content": [{"type": "output_text", "text": "Yes", "annotations": []}]},
                {"role": "user", "content": [{"type": "input_text", "text": "Two"}]},
            ],
        },
        VOCABULARY,
    )  # fmt: skip
    assert found.prompts[0].system == "Be brief." and found.settings.max_tokens == 5
    assert found.prompts[0].turns == (("user", "One"), ("model", "Yes"), ("user", "Two"))


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"}, {"conversation": "c"}, {"background": True},
        {"prompt": {"id": "p"}}, {"tools": [{"type": "function"}]}, {"n": 2},
        {"text": {"format": {"type": "xml"}}}, {"input": []}, {"input": [3]},
        {"input": [{"type": "function_call"}]}, {"input": [{"role": "tool", "content": "x"}]},
    ],
)  # fmt: skip
def test_a_response_refuses_what_needs_memory_or_is_wrong(fields):
    with pytest.raises(Refusal) as found:
        read_response_request({"input": "Hello", **fields}, VOCABULARY)
    assert found.value.status == 400


def test_texts():
    assert read_tokenize({"content": "a", "add_special": True}) == ("a", True, False)
    assert read_detokenize({"tokens": [1, 2]}, VOCABULARY) == [1, 2]
    for wrong in ({"tokens": [1000]}, {"tokens": "1"}, {"tokens": [True]}, {}):
        with pytest.raises(Refusal):
            read_detokenize(wrong, VOCABULARY)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "messages",
        "prompt",
        "input",
        "content",
        "role",
        "model",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "n",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "response_format",
        "modalities",
        "include",
        "instructions",
        "text",
        "tokens",
        "add_special",
        "best_of",
        "suffix",
        "echo",
        "user",
        "repeat_last_n",
        "repetition_penalty",
        "presence_penalty",
    ]
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content"]), JSON | st.sampled_from(["user", "system"]), max_size=2
    ),
    max_size=3,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(value=st.dictionaries(NAMES, JSON | MESSAGES, max_size=6) | JSON)
@pytest.mark.parametrize(
    "read",
    [
        lambda value: read_chat(value, VOCABULARY),
        lambda value: read_completion(value, VOCABULARY),
        lambda value: read_response_request(value, VOCABULARY),
        lambda value: read_detokenize(value, VOCABULARY),
        read_tokenize,
        read_apply_template,
    ],
    ids=["chat", "completion", "response", "detokenize", "tokenize", "apply_template"],
)
def test_whatever_json_comes_it_is_read_or_refused(read, value):
    try:
        read(value)
    except Refusal as refusal:
        assert 400 <= refusal.status < 500 and len(str(refusal)) < 600
