"""Clients that people use, against a live server on real weights."""

from __future__ import annotations

import json
import math
import subprocess

import openai
import pytest

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
