"""`/v1/embeddings`: requests as clients send them, a live server, several clients at once."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import threading

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.embedder import Embedder
from edge_demo.errors import EdgeError
from edge_demo.server.http.embedding import Embedding
from edge_demo.server.protocol.embeddings import MOST_INPUTS, embeddings_body, read_embeddings
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.worker.embedding_worker import EmbeddingJob, EmbeddingWorker
from edge_demo.server.worker.owner import BusyError, ClosedError
from edge_demo.text.embedding import EmbeddingTokens, cut
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.server.conftest import serving
from tests.edge_demo.server.test_http import wait_for
from tests.edge_demo.server.test_protocol import JSON
from tests.models import TEXT

VOCABULARY = 300
TEXTS = TEXT.split("\n")


# --- requests ------------------------------------------------------------------------------------


def read(**fields):
    return read_embeddings({"input": "a", **fields}, VOCABULARY)


def test_a_bare_request():
    found = read()
    assert (found.texts, found.ids, found.dimensions, found.as_base64) == (("a",), (), None, False)
    assert (found.model, found.prompt_name, found.truncate, found.unknown) == (None, None, False, 0)


@pytest.mark.parametrize(
    ("given", "texts", "ids"),
    [
        ("a", ("a",), ()),
        (["a", "b"], ("a", "b"), ()),
        ([1, 2], (), ((1, 2),)),
        ([[1, 2], [3]], (), ((1, 2), (3,))),
    ],
    ids=str,
)
def test_an_input_is_text_texts_tokens_or_lists_of_tokens(given, texts, ids):
    found = read(input=given)
    assert (found.texts, found.ids) == (texts, ids)


def test_every_field_arrives():
    found = read(
        model="m", dimensions=8, encoding_format="base64", prompt_name="query", truncate=True,
        user="me", colour="blue",
    )  # fmt: skip
    assert (found.model, found.dimensions, found.as_base64) == ("m", 8, True)
    assert (found.prompt_name, found.truncate, found.unknown) == ("query", True, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": None}, {"input": ""}, {"input": []}, {"input": [""]}, {"input": ["a", ""]},
        {"input": ["a", 1]}, {"input": [1, "a"]}, {"input": [[]]}, {"input": [[1], []]},
        {"input": [[1], "a"]}, {"input": [300]}, {"input": [-1]}, {"input": [1.5]},
        {"input": [True]}, {"input": [["a"]]}, {"input": {"a": 1}}, {"input": 3},
        {"input": ["a"] * (MOST_INPUTS + 1)}, {"input": [[1]] * (MOST_INPUTS + 1)},
        {"dimensions": 0}, {"dimensions": "8"}, {"dimensions": 1 << 20},
        {"encoding_format": "hex"}, {"encoding_format": 1}, {"model": 1}, {"truncate": "yes"},
        {"prompt_name": 3}, {"prompt_name": "x" * 300}, {"input": [1], "prompt_name": "query"},
    ],
    ids=lambda fields: str(fields)[:60],
)  # fmt: skip
def test_a_wrong_field_is_named(fields):
    with pytest.raises(Refusal) as refused:
        read(**fields)
    assert refused.value.status == 400 and refused.value.param in fields


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    value=st.dictionaries(
        st.sampled_from(
            ["input", "model", "dimensions", "encoding_format", "prompt_name", "truncate", "user"]
        ),
        JSON | st.lists(st.integers(-2, 301)) | st.lists(st.text() | st.lists(st.integers(0, 299))),
    )
    | JSON
)
def test_whatever_json_comes_it_is_read_or_refused(value):
    try:
        found = read_embeddings(value, VOCABULARY)
    except Refusal as refusal:
        assert refusal.status == 400 and str(refusal).isprintable()
    else:
        assert bool(found.texts) != bool(found.ids)
        assert all(found.texts) and all(0 <= t < VOCABULARY for ids in found.ids for t in ids)


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3), max_size=5))
def test_base64_holds_the_numbers_to_the_bit(rows):
    vectors = np.array(rows, np.float32).reshape(-1, 3)
    body = embeddings_body("m", vectors, 7, True)
    assert [entry["index"] for entry in body["data"]] == list(range(len(vectors)))
    for entry, vector in zip(body["data"], vectors, strict=True):
        found = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        np.testing.assert_array_equal(found, vector)
    floats = embeddings_body("m", vectors, 7, False)
    sent = np.array([entry["embedding"] for entry in floats["data"]], np.float32)
    np.testing.assert_array_equal(sent.reshape(-1, 3), vectors)
    assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


# --- the worker ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(tiny_bundles):
    return Embedder(Bundle.open(tiny_bundles / "embedder-fp32"), threads=1)


class Held:
    """An embedder that runs a batch when it is let: who waits for whom is then known."""

    def __init__(self, embedder):
        self._embedder = embedder
        self.spec = embedder.spec
        self.check = embedder.check
        self.let = threading.Semaphore(0)
        self.ran = []

    def in_steps(self, rows):
        for members, vectors in self._embedder.in_steps(rows):
            self.let.acquire()
            self.ran.append(len(rows))
            yield members, vectors


def jobs_of(worker, *all_rows):
    """Submit a job for each, and the futures of their results."""
    made = []
    for rows in all_rows:
        future = concurrent.futures.Future()
        job = EmbeddingJob(rows, future.set_result)
        worker.submit(job)
        made.append((job, future))
    return made


LONG = [[5] * 100] * 40  # several batches
SHORT = [[6] * 10]


def test_a_long_request_does_not_keep_a_short_one_waiting(embedder):
    held = Held(embedder)
    worker = EmbeddingWorker(held, 8)
    worker.start()
    (_, long), (_, short) = jobs_of(worker, LONG, SHORT)
    for _ in range(3):
        held.let.release()
    np.testing.assert_allclose(short.result(30), embedder.vectors(SHORT), atol=1e-6)
    assert not long.done() and held.ran.count(1) == 1
    for _ in range(100):
        held.let.release()
    np.testing.assert_allclose(long.result(30), embedder.vectors(LONG), atol=1e-6)
    worker.close()
    assert worker.counts == {
        "requests": 2, "refused": 0, "failures": 0, "texts": 41, "prompt_tokens": 4010,
    }  # fmt: skip
    with pytest.raises(ClosedError):
        jobs_of(worker, SHORT)


def test_a_full_queue_refuses_and_who_leaves_makes_room(embedder):
    held = Held(embedder)
    worker = EmbeddingWorker(held, 2)
    worker.start()
    (first, told), (second, _) = jobs_of(worker, LONG, SHORT)
    with pytest.raises(BusyError):
        jobs_of(worker, SHORT)
    worker.cancel(first)
    worker.cancel(second)
    held.let.release(), held.let.release()
    wait_for(lambda: worker.state == {"waiting": 0, "running": 0})
    assert not told.done() and worker.counts["refused"] == 1
    ((_, third),) = jobs_of(worker, SHORT)
    held.let.release()
    assert third.result(30).shape == (1, 40)
    worker.close()


def test_a_failure_is_of_one_request(embedder, monkeypatch):
    worker = EmbeddingWorker(embedder, 4)
    worker.start()

    def fails(rows):
        raise EdgeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(embedder, "_run", fails)
        ((_, failed),) = jobs_of(worker, SHORT)
        assert str(failed.result(30)) == "out of luck"
    ((_, good),) = jobs_of(worker, SHORT)
    assert good.result(30).shape == (1, 40)
    assert worker.alive and worker.counts["failures"] == 1
    worker.close()


# --- a live server -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny_bundles, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("serve"), tiny_bundles / "embedder-fp32") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    http = httpx.Client(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client:
        yield client


def expected(embedder, texts, prompt_name=None):
    tokens = EmbeddingTokens(embedder.spec, Tokenizer(embedder.bundle), embedder.longest)
    rows = tokens.of_texts(texts, prompt_name)
    return embedder.vectors(rows), sum(map(len, rows))


def test_openais_client_gets_the_vectors_in_order(client, server, embedder):
    """It asks for base64 where nobody says otherwise."""
    vectors, count = expected(embedder, TEXTS)
    for more in ({}, {"encoding_format": "float"}):
        found = client.embeddings.create(model=server.model, input=TEXTS, **more)
        assert [entry.index for entry in found.data] == list(range(len(TEXTS)))
        sent = np.array([entry.embedding for entry in found.data], np.float32)
        np.testing.assert_allclose(sent, vectors, atol=1e-6)
        assert (found.model, found.object) == (server.model, "list")
        assert found.usage.prompt_tokens == found.usage.total_tokens == count


def test_dimensions_and_prompts(client, server, embedder):
    whole, _ = expected(embedder, TEXTS[:2], "query")
    found = client.embeddings.create(
        model=server.model, input=TEXTS[:2], dimensions=8, extra_body={"prompt_name": "query"}
    )
    sent = np.array([entry.embedding for entry in found.data], np.float32)
    np.testing.assert_allclose(sent, cut(whole, 8), atol=1e-6)


def test_tokens_of_the_tokenize_route_are_the_text(client, server, embedder):
    vectors, _ = expected(embedder, TEXTS[:1])
    ids = server.http.post("/tokenize", json={"content": TEXTS[0]}).json()["tokens"]
    for given_ids in (ids, [ids]):
        found = client.embeddings.create(model=server.model, input=given_ids)
        np.testing.assert_allclose(found.data[0].embedding, vectors[0], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"input": ""}, 400, None, "input"),
        ({"input": ["a"] * 3000}, 400, None, "input"),
        ({"input": TEXT}, 400, "context_length_exceeded", "input"),
        ({"input": "a", "dimensions": 41}, 400, None, "dimensions"),
        ({"input": "a", "model": "another"}, 404, "model_not_found", "model"),
        ({"input": "a", "prompt_name": "title"}, 400, None, "prompt_name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_an_error_as_openais(server, fields, status, code, param):
    found = server.http.post("/v1/embeddings", json=fields)
    assert found.status_code == status
    error = found.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


def test_as_many_inputs_as_openai_takes(server):
    found = server.http.post("/v1/embeddings", json={"input": [[5]] * 2048, "dimensions": 1})
    assert found.status_code == 200 and len(found.json()["data"]) == 2048
    assert found.json()["usage"]["total_tokens"] == 2048 * 3


def test_all_inputs_together_have_a_limit(embedder, monkeypatch):
    route = Embedding(embedder, Tokenizer(embedder.bundle), EmbeddingWorker(embedder, 1))
    wanted = read(input=[[5] * 118] * 2)
    monkeypatch.setattr("edge_demo.server.http.embedding.MOST_TOKENS", 240)
    assert sum(map(len, route.rows(wanted))) == 240
    monkeypatch.setattr("edge_demo.server.http.embedding.MOST_TOKENS", 239)
    with pytest.raises(Refusal, match="240 tokens in all; the limit is 239"):
        route.rows(wanted)


def test_a_long_text_is_cut_where_that_is_asked_for(server):
    found = server.http.post("/v1/embeddings", json={"input": TEXT, "truncate": True})
    assert found.json()["usage"]["total_tokens"] == 120


@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses"])
def test_it_generates_nothing(server, route):
    found = server.http.post(f"/v1/{route}", json={"messages": [], "prompt": "a", "input": "a"})
    assert found.status_code == 400
    assert found.json()["error"]["code"] == "unsupported"
    assert "/v1/embeddings" in found.json()["error"]["message"]


def test_it_says_what_it_is_and_what_it_did(server):
    assert server.http.get("/health").json() == {"status": "ok"}
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["meta"]["dimensions"] == 40 and model["meta"]["prompts"] == ["document", "query"]
    assert server.http.get(f"/v1/models/{server.model}").json() == model
    assert server.http.get("/v1/models/another").status_code == 404
    before = server.metric("texts_total"), server.metric("requests_total")
    server.http.post("/v1/embeddings", json={"input": TEXTS, "colour": "blue"})
    assert server.metric("texts_total") == before[0] + len(TEXTS)
    assert server.metric("requests_total") == before[1] + 1
    assert server.metric("unknown_fields_total") >= 1
    assert server.http.get("/v1/embeddings").status_code == 405
    assert server.http.get("/").status_code == 404
    shown = server.http.post("/detokenize", json={"tokens": [267]})
    assert shown.status_code == 200


def test_many_clients_get_their_own_vectors(server, embedder):
    vectors, _ = expected(embedder, TEXTS)

    def ask(i):
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            found = http.post("/v1/embeddings", json={"input": [TEXTS[i % 8], TEXTS[(i + 1) % 8]]})
        return [entry["embedding"] for entry in found.json()["data"]]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for i, found in enumerate(pool.map(ask, range(32))):
            wanted = [vectors[i % 8], vectors[(i + 1) % 8]]
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_busy_is_told_and_who_leaves_makes_room(tiny_bundles, tmp_path):
    bundle = tiny_bundles / "embedder-fp32"
    with serving(tmp_path, bundle, "--queue", "1", "--threads", "1") as server:
        much = {"input": [[5 + i % 200] * 118 for i in range(2048)], "dimensions": 1}
        leaving = httpx.Client(base_url=server.url, trust_env=False)
        with contextlib.suppress(httpx.TimeoutException), leaving:
            threading.Thread(target=_leave, args=(leaving, much), daemon=True).start()
            wait_for(lambda: server.metric("running") == 1)
            refused = server.http.post("/v1/embeddings", json={"input": "a"})
            assert server.http.get("/health").status_code == 200
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "server_busy"
        wait_for(lambda: server.metric("running") == 0)
        assert server.metric("texts_total") < 2048
        assert server.http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        assert server.end() == 0 and "Traceback" not in server.log


def _leave(http, wanted):
    with contextlib.suppress(httpx.HTTPError):
        http.post("/v1/embeddings", json=wanted, timeout=httpx.Timeout(60, read=1.0))


def test_sigterm_lets_a_request_end(tiny_bundles, tmp_path):
    with serving(tmp_path, tiny_bundles / "embedder-fp32") as server:
        answered = concurrent.futures.Future()
        much = {"input": [[5 + i % 200] * 118 for i in range(500)], "dimensions": 1}

        def ask():
            with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
                answered.set_result(http.post("/v1/embeddings", json=much))

        threading.Thread(target=ask, daemon=True).start()
        wait_for(lambda: server.metric("requests_total") == 1)
        assert server.end() == 0
        assert len(answered.result(30).json()["data"]) == 500


def test_it_needs_a_key_where_there_are_keys(tiny_bundles, tmp_path):
    bundle = tiny_bundles / "embedder-int8"
    with serving(tmp_path, bundle, EDGE_DEMO_API_KEY="open sesame") as server:
        assert server.http.post("/v1/embeddings", json={"input": "a"}).status_code == 401
        headers = {"authorization": "Bearer open sesame"}
        found = server.http.post("/v1/embeddings", json={"input": "a"}, headers=headers)
        assert found.status_code == 200
