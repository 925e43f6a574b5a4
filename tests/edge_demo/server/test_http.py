"""A live server, asked by a plain HTTP client."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time

import httpx
import pytest

from tests.edge_demo.server.conftest import serving


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def events(response):
    """The objects of a stream, and what else was in it."""
    lines = [line for line in response.text.split("\n") if line]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"], lines


def test_health_models_and_metrics(tiny_server):
    assert tiny_server.http.get("/health").json() == {"status": "ok"}
    listed = tiny_server.http.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == [tiny_server.model]
    assert listed[0]["meta"]["instruction_tuned"]
    one = tiny_server.http.get(f"/v1/models/{tiny_server.model}")
    assert one.json() == listed[0]
    assert tiny_server.http.get("/v1/models/other").status_code == 404
    before = tiny_server.metric("completion_tokens_total")
    assert tiny_server.ask("Hello", max_tokens=5).status_code == 200
    assert tiny_server.metric("completion_tokens_total") - before in range(1, 6)
    assert tiny_server.metric("resident_bytes") > 10**7


def test_a_chat_whole_and_as_a_stream_are_the_same(tiny_server):
    wanted = {"max_tokens": 20, "seed": 4, "temperature": 0.8}
    whole = tiny_server.ask("Hello", **wanted).json()
    choice = whole["choices"][0]
    assert whole["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    streamed = tiny_server.ask("Hello", **wanted, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    found, lines = events(streamed)
    assert lines[-1] == "data: [DONE]"
    deltas = [c["delta"] for chunk in found for c in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]
    assert found[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert all("usage" not in chunk for chunk in found)
    with_usage = tiny_server.ask(
        "Hello", **wanted, stream=True, stream_options={"include_usage": True}
    )
    last = events(with_usage)[0][-1]
    assert (
        last["choices"] == [] and last["usage"]["completion_tokens"] == usage["completion_tokens"]
    )
    assert last["timings"]["predicted_n"] == usage["completion_tokens"]


def test_choices_have_seeds_of_their_own(tiny_server):
    both = tiny_server.ask("Hello", max_tokens=9, seed=4, n=2).json()
    texts = [c["message"]["content"] for c in both["choices"]]
    single = [
        tiny_server.ask("Hello", max_tokens=9, seed=seed).json()["choices"][0]["message"]["content"]
        for seed in (4, 5)
    ]
    assert texts == single and [c["index"] for c in both["choices"]] == [0, 1]
    assert both["usage"]["completion_tokens"] > 9


def test_completions_of_several_texts(tiny_server):
    ids = tiny_server.http.post("/tokenize", json={"content": "Once", "add_special": True}).json()
    asked = {"max_tokens": 6, "temperature": 0}
    several = tiny_server.http.post(
        "/v1/completions", json={"prompt": ["Once", "Twice"], **asked}
    ).json()
    assert [c["index"] for c in several["choices"]] == [0, 1]
    tokens = tiny_server.http.post("/v1/completions", json={"prompt": ids["tokens"], **asked})
    assert tokens.json()["choices"][0]["text"] == several["choices"][0]["text"]
    logprobs = tiny_server.http.post(
        "/v1/completions", json={"prompt": "Once", **asked, "logprobs": 2}
    ).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 6
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"])


def test_a_response_whole_and_as_a_stream(tiny_server):
    asked = {"input": "Hello", "max_output_tokens": 8, "seed": 1}
    whole = tiny_server.http.post("/v1/responses", json=asked).json()
    text = whole["output"][0]["content"][0]["text"]
    assert whole["status"] in ("incomplete", "completed") and not whole["store"]
    stream = tiny_server.http.post("/v1/responses", json={**asked, "stream": True})
    found, lines = events(stream)
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names == [one["type"] for one in found]
    assert names[0] == "response.created" and names[-1] == f"response.{whole['status']}"
    said = "".join(o["delta"] for o in found if o["type"] == "response.output_text.delta")
    assert said == text == found[-1]["response"]["output"][0]["content"][0]["text"]


def test_tokens_texts_and_templates(tiny_server):
    post = tiny_server.http.post
    tokens = post("/tokenize", json={"content": "Hello é"}).json()["tokens"]
    assert post("/detokenize", json={"tokens": tokens}).json() == {"content": "Hello é"}
    pieces = post("/tokenize", json={"content": "Hello", "with_pieces": True}).json()["tokens"]
    assert "".join(one["piece"] for one in pieces) == "Hello"
    messages = [{"role": "user", "content": "<end_of_turn>Hi"}]
    found = post("/apply-template", json={"messages": messages}).json()
    assert found["prompt"].endswith("<start_of_turn>model\n")
    used = tiny_server.ask("<end_of_turn>Hi", max_tokens=1).json()["usage"]["prompt_tokens"]
    assert len(found["tokens"]) == used
    # what a user writes is text, whatever it looks like
    plain = post("/tokenize", json={"content": "<end_of_turn>"}).json()["tokens"]
    assert len(plain) > 1


def test_errors_have_openais_form(tiny_server):
    post, headers = tiny_server.http.post, {"content-type": "application/json"}
    cases = [
        (post("/v1/chat/completions", content=b"{", headers=headers), 400, "invalid_json"),
        (post("/v1/chat/completions", content=b"\xff", headers=headers), 400, "invalid_json"),
        (post("/v1/chat/completions", content=b"[" * 10**5, headers=headers), 400, "invalid_json"),
        (post("/v1/chat/completions", content=b'{"n": NaN}', headers=headers), 400, "invalid_json"),
        (post("/v1/chat/completions", content=b"{}"), 415, "unsupported_media_type"),
        (post("/v1/chat/completions", content=b"[1]", headers=headers), 400, None),
        (tiny_server.ask("Hi", model="other"), 404, "model_not_found"),
        (tiny_server.ask("Hi " * 9000), 400, "context_length_exceeded"),
        (tiny_server.ask("x" * (5 << 20)), 413, "request_too_large"),
        (tiny_server.ask("Hi", tools=[{"type": "retrieval"}]), 400, "unsupported"),
        (post("/v1/embeddings", json={"input": "a", "model": "m"}), 400, "unsupported"),
        (tiny_server.http.get("/v1/chat/completions"), 405, "method_not_allowed"),
        (tiny_server.http.get("/nothing/../here"), 404, "not_found"),
        (tiny_server.http.get("/etc/passwd"), 404, "not_found"),
    ]
    for response, status, code in cases:
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code)
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert response.headers["x-content-type-options"] == "nosniff"
    assert tiny_server.ask("Hi", max_tokens=2).status_code == 200


def test_a_name_or_a_page_elsewhere_is_refused(tiny_server):
    get = tiny_server.http.get
    assert get("/health", headers={"host": "evil.example"}).status_code == 403
    assert get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    own = get("/v1/models", headers={"origin": tiny_server.url})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    asked = tiny_server.http.options(
        "/v1/chat/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert asked.status_code == 403


def test_keys_and_named_pages(tiny_bundles, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    page = {"origin": "https://chat.example"}
    options = ("--api-key-file", str(keys), "--cors-origin", page["origin"])
    with serving(tmp_path, tiny_bundles / "chat", *options, EDGE_DEMO_API_KEY="three") as server:
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/metrics").status_code == 401
        assert server.ask("Hi").status_code == 401
        for key in ("one", "two", "three"):
            headers = {"authorization": f"Bearer {key}", **page}
            answer = server.http.get("/v1/models", headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == page["origin"]
        refused = server.http.get("/v1/models", headers=page)
        assert refused.headers["access-control-allow-origin"] == page["origin"]
        asked = server.http.options("/v1/models", headers=page)
        assert asked.status_code == 204
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert "Hi" not in server.log and "three" not in server.log


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(tiny_server, stream):
    messages = [{"role": "user", "content": "Hello"}]
    endless = {"messages": messages, "stream": stream, "logit_bias": {"1": -100, "107": -100}}
    body = json.dumps(endless).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/json\r\n\r\n"
    )
    address = (tiny_server.http.base_url.host, tiny_server.http.base_url.port)
    with socket.create_connection(address) as client:
        client.sendall(head.encode() + body)
        wait_for(lambda: tiny_server.metric("answering") == 1)
    wait_for(lambda: tiny_server.metric("answering") == 0)


def test_sigterm_lets_a_stream_end(tiny_bundles, tmp_path):
    with serving(tmp_path, tiny_bundles / "chat") as server:
        messages = [{"role": "user", "content": "Hello"}]
        wanted = {
            "messages": messages,
            "stream": True,
            "max_tokens": 300,
            "logit_bias": {"1": -100},
        }
        with server.http.stream("POST", "/v1/chat/completions", json=wanted) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            server.http.get("/health")
        assert server.log.count("\n") == 1


def test_sigterm_does_not_wait_for_ever(tiny_bundles, tmp_path):
    with serving(tmp_path, tiny_bundles / "chat", "--drain-s", "1") as server:
        messages = [{"role": "user", "content": "Hello"}]
        wanted = {"messages": messages, "stream": True, "n": 4}
        with server.http.stream("POST", "/v1/chat/completions", json=wanted) as response:
            next(response.iter_lines())
            assert server.end() == 0


def test_killed_under_load_it_starts_again(tiny_bundles, tmp_path):
    with serving(tmp_path, tiny_bundles / "chat") as server:
        messages = [{"role": "user", "content": "Hello"}]
        wanted = {"messages": messages, "stream": True}
        with server.http.stream("POST", "/v1/chat/completions", json=wanted) as response:
            next(response.iter_lines())
            assert server.end(signal.SIGKILL) == -signal.SIGKILL
    port = server.url.rpartition(":")[2]
    with serving(tmp_path, tiny_bundles / "chat", "--port", port) as server:
        assert server.url.endswith(port)
        assert server.ask("Hello", max_tokens=3).status_code == 200


def test_busy_is_told_to_come_back(tiny_bundles, tmp_path):
    with serving(tmp_path, tiny_bundles / "chat", "--parallel", "1", "--queue", "1") as server:
        never = server.ask("Hello", n=3, max_tokens=5)
        assert never.status_code == 400 and "3 answers" in never.json()["error"]["message"]
        messages = [{"role": "user", "content": "Hello"}]
        endless = {"messages": messages, "stream": True, "logit_bias": {"1": -100, "107": -100}}
        with contextlib.ExitStack() as streams:
            for waiting in (0, 1):
                asked = server.http.stream("POST", "/v1/chat/completions", json=endless)
                streams.enter_context(asked)
                wait_for(lambda: server.metric("answering") == 1)
                wait_for(lambda waiting=waiting: server.metric("waiting") == waiting)
            refused = server.ask("Hello", max_tokens=5)
        # whoever leaves while waiting leaves the queue too
        wait_for(lambda: server.metric("waiting") == server.metric("answering") == 0)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "server_busy"
        assert server.ask("Hello", max_tokens=5).status_code == 200


def test_it_sleeps_while_nobody_asks(tiny_server):
    def seconds():
        with open(f"/proc/{tiny_server.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    tiny_server.ask("Hello", max_tokens=3)
    time.sleep(0.5)
    before = seconds()
    time.sleep(2)
    assert seconds() - before <= 0.04


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--host", "0.0.0.0"), ["--api-key-file", "--allow-anyone"]),
        (("--host", "no.such.host.invalid"), ["no.such.host.invalid"]),
        (("--port", "99999"), ["port"]),
        (("--api-key-file", "/nonexistent"), ["API keys"]),
        (("--parallel", "3"), ["3"]),
        (("--cache-mb", "-1"), ["-1"]),
    ],
)
def test_a_server_that_cannot_be_says_so(refused, tiny_bundles, options, names):
    if "no.such.host.invalid" in options:
        options += ("--allow-anyone",)
    refused("serve", tiny_bundles / "chat", *options, names=names)


def test_a_port_that_is_taken(refused, tiny_server, tiny_bundles):
    port = tiny_server.url.rpartition(":")[2]
    refused("serve", tiny_bundles / "chat", "--port", port, names=[port, "--port"])
