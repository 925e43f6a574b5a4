"""A live server with a guard: what it refuses, what it holds back, what it counts and logs.

Which answer the model gives is decided by a regular expression, since a small random model says
nothing that means something. The guard judges it as any answer.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import time
from typing import NamedTuple

import openai
import pytest

from edge_demo.guard.template import POLICIES, Policy
from tests.edge_demo.guard.conftest import judge_on
from tests.edge_demo.make_guard import lines
from tests.edge_demo.server.conftest import serving
from tests.edge_demo.server.test_http import events

EVERY = 8


class Case(NamedTuple):
    """A policy, and texts that the small guard tells apart by it.

    Attributes:
        policy: of the guard.
        threshold: between the probabilities of the texts, as somebody chooses it who has measured.
        bad, good: prompts.
        bad_answer, good_answer: to the good prompt. The second one's beginnings are good, too.
    """

    policy: Policy
    threshold: float
    bad: str
    good: str
    bad_answer: str
    good_answer: str


def extremes(scored, policy):
    """The texts with the least and the greatest probability, and the latter."""
    ordered = sorted(scored, key=lambda one: scored[one][policy])
    return ordered[0], ordered[-1], scored[ordered[-1]][policy]


@pytest.fixture(scope="module")
def case(tiny_guard):
    """The policy with the widest margin. The guard is too small to be right about every text."""
    judge, texts = judge_on(tiny_guard), lines()
    prompts = [x["prompt"] for x in texts if not x["response"]]
    answers = list(dict.fromkeys(x["response"] for x in texts if x["response"]))
    of_prompts = {text: judge.probabilities(text) for text in prompts[::4]}
    found = []
    for policy in POLICIES:
        good, bad, of_bad = extremes(of_prompts, policy.name)
        of_answers = {text: judge.probabilities(good, text) for text in answers}
        good_answer, bad_answer, of_bad_answer = extremes(of_answers, policy.name)
        begun = [good_answer[:n] for n in range(1, len(good_answer) + 1)]
        passing = [judge.probabilities(good, text)[policy.name] for text in begun]
        top = max(*passing, of_prompts[good][policy.name])
        least = min(of_bad, of_bad_answer)
        texts = (bad, good, bad_answer, good_answer)
        found.append((least - top, Case(policy, (least + top) / 2, *texts)))
    margin, case = max(found, key=lambda one: one[0])
    assert margin > 0.05
    return case


@pytest.fixture(scope="module")
def guarded(tiny_bundles, tiny_guard, case, tmp_path_factory):
    """A server with the guard on input and output, and its log with texts."""
    folder = tmp_path_factory.mktemp("serve")
    options = ["--guard", tiny_guard, "--guard-policy", case.policy.name]
    options += ["--guard-threshold", case.threshold, "--guard-every", EVERY]
    options += ["--guard-log", folder / "log", "--guard-log-text"]
    with serving(folder, tiny_bundles / "chat", *map(str, options)) as server:
        server.decisions = folder / "log"
        yield server


def only(text):
    """Fields that have the model say one text."""
    return {"response_format": {"type": "regex", "regex": re.escape(text)}, "temperature": 0}


def count(server, on, decision):
    line = f'edge_demo_guard_decisions_total{{on="{on}",decision="{decision}"}} '
    found = [x for x in server.http.get("/metrics").text.splitlines() if x.startswith(line)]
    return int(found[0].split()[-1])


def said(chunks):
    return "".join(c["delta"].get("content", "") for o in chunks for c in o["choices"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_prompt_is_refused_as_azure_does(guarded, case, stream):
    before = count(guarded, "input", "refused")
    answer = guarded.ask(case.bad, stream=stream, max_tokens=5)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "content_filter" and error["type"] == "invalid_request_error"
    assert error["message"].endswith(f"because of {case.policy.harm.lower()}")
    assert count(guarded, "input", "refused") == before + 1


def test_every_route_is_guarded(guarded, case):
    post, messages = guarded.http.post, [{"role": "user", "content": case.bad}]
    ids = post("/tokenize", json={"content": case.bad, "add_special": True}).json()["tokens"]
    for route, body in (
        ("/v1/completions", {"prompt": case.bad}),
        ("/v1/completions", {"prompt": [case.good, case.bad]}),
        ("/v1/completions", {"prompt": ids}),
        ("/v1/responses", {"input": case.bad}),
        ("/v1/chat/completions", {"messages": messages, "n": 2}),
    ):
        answer = post(route, json=body)
        assert answer.status_code == 400, route
        assert answer.json()["error"]["code"] == "content_filter"


def test_the_last_turn_of_the_user_is_judged(guarded, case):
    talk = [(case.bad, "user"), ("No.", "assistant"), (case.good, "user")]
    messages = [{"role": role, "content": text} for text, role in talk]
    body = {"messages": messages, "max_tokens": 2}
    assert guarded.http.post("/v1/chat/completions", json=body).status_code == 200


def test_the_client_of_openai_raises_and_does_not_retry(guarded, case):
    before = count(guarded, "input", "refused")
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(
                model=guarded.model, messages=[{"role": "user", "content": case.bad}]
            )
        assert raised.value.code == "content_filter"
        answer = client.chat.completions.create(
            model=guarded.model,
            messages=[{"role": "user", "content": case.good}],
            extra_body=only(case.bad_answer),
        )
    assert answer.choices[0].finish_reason == "content_filter"
    assert count(guarded, "input", "refused") == before + 1


def test_a_bad_answer_is_withheld_and_a_good_one_is_not(guarded, case):
    choice = guarded.ask(case.good, **only(case.bad_answer), logprobs=True).json()["choices"][0]
    assert choice["finish_reason"] == "content_filter" and choice["message"]["content"] == ""
    assert not choice["logprobs"]["content"]
    choice = guarded.ask(case.good, **only(case.good_answer)).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == case.good_answer


def test_a_stream_shows_only_what_was_judged(guarded, case):
    for text in (case.good_answer, f"{case.good_answer} {case.bad_answer}", case.bad_answer):
        guarded.decisions.write_bytes(b"")
        found, written = events(guarded.ask(case.good, **only(text), stream=True))
        assert written[-1] == "data: [DONE]"
        log = [json.loads(line) for line in guarded.decisions.read_text().splitlines()]
        judged = [x for x in log if x["on"] == "output"]
        passed = [""] + [x["response"] for x in judged if x["decision"] == "passed"]
        assert said(found) == passed[-1]
        assert text.startswith(judged[-1]["response"])
        reason = found[-1]["choices"][0]["finish_reason"]
        if judged[-1]["decision"] == "passed":
            assert reason in ("stop", "length")  # both answers may be more than the context holds
        else:
            assert len(passed) == len(judged) and reason == "content_filter"
        if text == case.bad_answer:
            assert reason == "content_filter"


def test_a_bad_answer_ends_a_stream_and_frees_its_row(guarded, case):
    found, _ = events(guarded.ask(case.good, **only(case.bad_answer * 8), stream=True))
    assert found[-1]["choices"][0]["finish_reason"] == "content_filter"
    assert said(found) in case.bad_answer * 8 and len(said(found)) < len(case.bad_answer * 8)
    end = time.monotonic() + 20
    while guarded.metric("answering") and time.monotonic() < end:
        time.sleep(0.02)
    assert guarded.metric("answering") == 0


def test_choices_are_judged_one_by_one(guarded, case):
    either = f"({re.escape(case.good_answer)}|{re.escape(case.bad_answer)})"
    wanted = {"response_format": {"type": "regex", "regex": either}, "n": 4, "temperature": 2}
    ends = set()
    for seed in range(0, 40, 4):
        for choice in guarded.ask(case.good, seed=seed, **wanted).json()["choices"]:
            ends.add(choice["finish_reason"])
            expected = "" if choice["finish_reason"] == "content_filter" else case.good_answer
            assert choice["message"]["content"] == expected
        if len(ends) == 2:
            break
    assert ends == {"content_filter", "stop"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_incomplete(guarded, case, stream):
    text = {"format": only(case.bad_answer)["response_format"]}
    answer = guarded.http.post(
        "/v1/responses", json={"input": case.good, "text": text, "stream": stream}
    )
    response = events(answer)[0][-1]["response"] if stream else answer.json()
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "content_filter"}
    assert case.bad_answer not in json.dumps(response)


def test_what_the_guard_cannot_hold_is_refused_or_ends(guarded, case):
    answer = guarded.ask("Bread rises slowly in a cold kitchen. " * 90)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_others_are_answered_while_the_guard_judges(guarded, case):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(guarded.ask, case.good, max_tokens=3, seed=i) for i in range(12)]
        slowest = 0.0
        while not all(one.done() for one in asked):
            begin = time.monotonic()
            assert guarded.http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - begin)
    assert {one.result().status_code for one in asked} == {200}
    assert slowest < 5


def test_numbers_of_the_guard(guarded, case):
    assert guarded.ask(case.bad).status_code == 400
    guarded.ask(case.good, **only(case.good_answer), stream=True)
    text = guarded.http.get("/metrics").text
    assert 'edge_demo_guard_refusals_total{policy="' + case.policy.name + '"} ' in text
    tokens = dict(re.findall(r'edge_demo_guard_tokens_total{of="(\w+)"} (\d+)', text))
    assert all(int(tokens[of]) > 0 for of in ("texts", "reused", "policies"))
    assert float(re.findall(r"^edge_demo_guard_seconds_total (\S+)", text, re.M)[0]) > 0
    for name in re.findall(r"# TYPE (\S+)", text):
        assert text.count(f"# TYPE {name} ") == 1


@pytest.mark.parametrize("on", ["input", "output"])
def test_a_guard_on_one_side_leaves_the_other(tiny_bundles, tiny_guard, tmp_path, on):
    prompt, said = "How do I bake bread?", "Read a book."
    options = ("--guard", str(tiny_guard), "--guard-on", on, "--guard-threshold", "1e-9")
    log = ("--guard-log", str(tmp_path / "log"))
    with serving(tmp_path, tiny_bundles / "chat", *options, *log) as server:
        answer = server.ask(prompt, **only(said))
        assert answer.status_code == (400 if on == "input" else 200)
        if on == "output":
            assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
        assert server.end() == 0
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["on"] == on
    assert "bread" not in line and "book" not in line


def test_a_stream_comes_in_parts_that_were_judged(tiny_bundles, tiny_guard, tmp_path):
    # long, so that it outlasts several judgments on any machine
    wanted = {"max_tokens": 150, "seed": 4, "temperature": 0.8}
    log = ("--guard-log", str(tmp_path / "log"), "--guard-log-text")
    options = ("--guard", str(tiny_guard), "--guard-threshold", "1", "--guard-every", "4")
    bundle = tiny_bundles / "long-chat"
    with serving(tmp_path, bundle, *options, *log) as server:
        found, _ = events(server.ask("Hello", **wanted, stream=True))
    with serving(tmp_path, bundle) as server:
        alone = server.ask("Hello", **wanted).json()["choices"][0]["message"]["content"]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    judged = [x["response"] for x in lines if x["on"] == "output"]
    assert len(judged) > 1  # as many as the machine has time for; test_guarding.py counts them
    shown = ""
    for chunk in found:
        shown += said([chunk])
        # of what is shown, all is within a text that was judged
        assert any(text.startswith(shown) for text in judged)
    assert shown == judged[-1] == alone


def test_a_server_without_a_guard_counts_none(tiny_server):
    assert "guard" not in tiny_server.http.get("/metrics").text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--guard-log", "log"], "--guard-log is only valid with --guard"),
        (["--guard-policy", "hate"], "--guard-policy is only valid with --guard"),
        (["--guard-threshold", "2"], "the threshold '2' must be"),
        (["--guard", "none", "--guard-log-text"], "only valid with --guard-log"),
        (["--guard", "none", "--port", "0"], "none does not exist"),
    ],
)
def test_options_that_cannot_be_are_refused(tiny_bundles, refused, options, message):
    refused("serve", tiny_bundles / "chat", *options, names=[message])


def test_a_model_that_is_no_guard_is_refused(tiny_bundles, refused):
    chat = tiny_bundles / "chat"
    refused("serve", chat, "--port", "0", "--guard", chat, names=["cannot be a guard"])
