"""The contract of Vertex AI's containers, with plain HTTP."""

from __future__ import annotations

import socket

import pytest

from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.vertex import Vertex, read_predict
from tests.edge_demo.server.conftest import serving


def test_predictions_of_prompts_and_conversations(tiny_bundles, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = {
        "AIP_HTTP_PORT": str(port),
        "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
    }
    with serving(tmp_path, tiny_bundles / "chat", "--vertex", **environment) as server:
        base = f"http://127.0.0.1:{port}"
        gateway = {"host": "gateway.internal"}
        health = server.http.get(f"{base}{environment['AIP_HEALTH_ROUTE']}", headers=gateway)
        assert health.status_code == 200
        instances = [
            {"prompt": "Once", "temperature": 0},
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3},
        ]
        found = server.http.post(
            f"{base}{environment['AIP_PREDICT_ROUTE']}",
            json={"instances": instances, "parameters": {"max_tokens": 5, "seed": 1}},
            headers=gateway,
        )
        once, hello = found.json()["predictions"]
        assert once["usage"]["completion_tokens"] == 5 and once["choices"][0]["text"]
        assert hello["choices"][0]["message"]["role"] == "assistant"
        assert hello["usage"]["completion_tokens"] <= 3
        for wrong in ({}, {"instances": []}, {"instances": [{}]}, {"instances": [3]}):
            answer = server.http.post(f"{base}{environment['AIP_PREDICT_ROUTE']}", json=wrong)
            assert answer.status_code == 400 and "instances" in answer.json()["error"]["message"]


def test_a_prediction_is_not_streamed():
    with pytest.raises(Refusal, match="stream"):
        read_predict({"instances": [{"prompt": "a", "stream": True}]}, 10)


@pytest.mark.parametrize(
    "environment",
    [{"AIP_HTTP_PORT": "x"}, {"AIP_HTTP_PORT": "0"}, {"AIP_HEALTH_ROUTE": "health"},
     {"AIP_PREDICT_ROUTE": "/a{b}"}],
)  # fmt: skip
def test_an_environment_that_makes_no_sense(environment):
    with pytest.raises(Refusal, match=next(iter(environment))):
        Vertex.of(environment)


def test_without_an_environment_there_are_defaults():
    assert Vertex.of({}) == Vertex(8080, "/health", "/predict")
