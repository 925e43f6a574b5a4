"""Clients that people use, against a live server on real weights."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import jsonschema
import langchain_openai
import openai
import pytest

from tests.conftest import ROOT
from tests.edge_demo.server.test_http import wait_for

pytestmark = pytest.mark.sample

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(real_server):
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def test_a_chat_answers_and_ends(client, model):
    found = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    choice = found.choices[0]
    assert "Paris" in choice.message.content and choice.finish_reason == "stop"
    assert found.usage.completion_tokens < 100 < 4096
    again = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    assert again.choices[0].message.content == choice.message.content


def test_a_conversation_goes_on_and_runs_only_what_is_new(client, model, real_server):
    system = {"role": "system", "content": "You answer in one short sentence. " * 12}
    messages = [system, *QUESTION]
    first = client.chat.completions.create(model=model, messages=messages, temperature=0)
    wait_for(lambda: real_server.metric("reading_ahead") == 0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And of Italy?"},
    ]
    second = client.chat.completions.create(model=model, messages=messages, temperature=0)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.total_tokens - 64
    assert cached > first.usage.prompt_tokens or first.usage.completion_tokens < 64


def test_a_stream(client, model):
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    pieces, last = [], None
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    with stream:
        for chunk in stream:
            pieces += [c.delta.content or "" for c in chunk.choices]
            last = chunk
    assert len([p for p in pieces if p]) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_text_is_never_half_shown(client, model):
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stop=[stop], stream=True
    )
    with stream:
        chunks = list(stream)
    shown = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert shown == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_limit(client, model):
    found = client.chat.completions.create(
        model=model, messages=QUESTION, max_completion_tokens=2, temperature=0
    )
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 2


def test_logprobs(client, model):
    found = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=5
    )
    tokens = found.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == found.choices[0].message.content
    for token in tokens:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy takes the likeliest
        assert sum(math.exp(t.logprob) for t in token.top_logprobs) <= 1.0001
        assert len(token.top_logprobs) == 5


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Italy", "Spain"]},
        "big": {"type": "boolean"},
    },
    "required": ["city", "country", "big"],
    "additionalProperties": False,
}


def test_json_schema(client, model):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for seed in range(3):
        found = client.chat.completions.create(
            model=model, messages=QUESTION, response_format=form, seed=seed
        )
        city = json.loads(found.choices[0].message.content)
        assert set(city) == {"city", "country", "big"} and found.choices[0].finish_reason == "stop"
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(model=model, messages=QUESTION, response_format=form)


def test_any_json(client, model):
    found = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Give the capital of France as JSON."}],
        response_format={"type": "json_object"}, temperature=0, max_tokens=200,
    )  # fmt: skip
    if found.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(found.choices[0].message.content), dict)
    assert found.choices[0].message.content.startswith("{")


def test_completions_and_responses(client, model):
    done = client.completions.create(model=model, prompt="Paris is", max_tokens=4, temperature=0)
    assert done.choices[0].text
    made = client.responses.create(
        model=model, input=QUESTION[0]["content"], temperature=0, store=False
    )
    assert "Paris" in made.output_text and made.status == "completed"
    with client.responses.stream(
        model=model, input=QUESTION[0]["content"], temperature=0, store=False
    ) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == made.output_text
    assert kinds[-1] == "response.completed"


def test_errors_become_the_clients_exceptions_and_are_not_tried_again(client, model, real_server):
    before = real_server.metric("requests_total")
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model, messages=QUESTION, temperature=1000)
    with pytest.raises(openai.BadRequestError, match="context"):
        long = [{"role": "user", "content": "word " * 40_000}]
        client.chat.completions.create(model=model, messages=long)
    assert real_server.metric("requests_total") == before


def test_curl(real_server):
    body = json.dumps({"messages": QUESTION, "temperature": 0})
    out = subprocess.run(
        ["curl", "-s", "--noproxy", "*", f"{real_server.url}/v1/chat/completions",
         "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "Paris" in json.loads(out)["choices"][0]["message"]["content"]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "maxLength": 12}},
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    },
]
SUM = [{"role": "user", "content": "What is 17 plus 25?"}]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def test_a_tool_is_called_and_its_result_goes_back(client, model):
    asked = {"model": model, "tools": TOOLS, "temperature": 0, "parallel_tool_calls": False}
    first = client.chat.completions.create(messages=SUM, tool_choice="required", **asked)
    choice = first.choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 17, "b": 25}
    result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
    messages = [*SUM, choice.message, result]
    second = client.chat.completions.create(
        messages=messages, tool_choice="none", model=model, temperature=0, max_tokens=40
    )
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls
    third = client.chat.completions.create(messages=messages, max_tokens=40, **asked)
    assert third.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 64 * 64


def test_calls_are_streamed(client, model):
    asked = {"model": model, "messages": SUM, "tools": TOOLS, "temperature": 0}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
    name, arguments, ids, reasons = None, "", set(), []
    with client.chat.completions.create(stream=True, **asked) as stream:
        for chunk in stream:
            for piece in chunk.choices[0].delta.tool_calls or []:
                name = piece.function.name or name
                arguments += piece.function.arguments
                ids.add(piece.id)
            reasons.append(chunk.choices[0].finish_reason)
    assert (name, arguments) == (whole.function.name, whole.function.arguments)
    assert reasons[-1] == "tool_calls" and len(ids - {None}) == 1


@pytest.mark.parametrize("seed", range(10))
def test_ten_calls_at_temperature_1_all_parse(client, model, seed):
    found = client.chat.completions.create(
        model=model, messages=SUM, tools=TOOLS, tool_choice="required", seed=seed
    )
    assert found.choices[0].finish_reason == "tool_calls"
    for call in found.choices[0].message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


def test_a_response_calls_a_tool(client, model):
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked = {"model": model, "tools": flat, "temperature": 0, "store": False}
    with client.responses.stream(
        input=SUM, tool_choice={"type": "function", "name": "add"}, **asked
    ) as stream:
        names = [event.type for event in stream]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call" and call.name == "add" and call.status == "completed"
    assert json.loads(call.arguments) == {"a": 17, "b": 25}
    assert names[2] == "response.output_item.added" and names[-1] == "response.completed"
    assert names.count("response.function_call_arguments.done") == 1
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    found = client.responses.create(
        input=[*SUM, call, output], max_output_tokens=40, **asked | {"tools": []}
    )
    assert found.output_text


def test_langchain(real_server, model):
    chat = langchain_openai.ChatOpenAI(
        model=model, base_url=f"{real_server.url}/v1", api_key="none", temperature=0, max_tokens=60
    )
    assert "Paris" in chat.invoke(QUESTION).content
    pieces = [piece.content for piece in chat.stream(QUESTION)]
    assert len([p for p in pieces if p]) > 1 and "Paris" in "".join(pieces)

    called = chat.bind_tools(TOOLS, tool_choice="add").invoke(SUM)
    assert [(c["name"], c["args"]) for c in called.tool_calls] == [("add", {"a": 17, "b": 25})]
    result = {"role": "tool", "tool_call_id": called.tool_calls[0]["id"], "content": "42"}
    assert chat.invoke([*SUM, called, result]).content

    titled = CITY | {"title": "City", "description": "A city."}
    found = chat.with_structured_output(titled).invoke(QUESTION)
    jsonschema.validate(found, CITY)


def test_llm(real_server, model, tmp_path):
    described = {"model_id": "edge", "model_name": model, "api_base": f"{real_server.url}/v1"}
    described |= {"supports_schema": True, "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([described]))
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def ask(*more):
        command = [sys.executable, "-m", "llm", "-m", "edge", "-o", "temperature", "0", *more]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Paris" in ask(QUESTION[0]["content"])
    assert "Paris" in ask("--no-stream", QUESTION[0]["content"])
    found = json.loads(ask("--schema", json.dumps(CITY), QUESTION[0]["content"]))
    jsonschema.validate(found, CITY)


def test_the_example_calls_functions_and_answers(real_server):
    command = [sys.executable, "examples/call_functions.py", "Which day was 1969-07-20?"]
    command += ["--url", f"{real_server.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r'(day_of_week|add)\({".*}\) = ', lines[0]) and len(lines) > 1
