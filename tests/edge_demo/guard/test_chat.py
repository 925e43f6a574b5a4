"""`edge-demo chat` with a guard, in a pipe and at a terminal."""

from __future__ import annotations

import itertools
import json

import pytest

GOOD = "How do I bake bread?"
CHAT = ("--max-tokens", "12", "--seed", "3", "--no-history")
ALWAYS, NEVER = ("--guard-threshold", "1e-9"), ("--guard-threshold", "1")


@pytest.fixture
def chat(run, tiny_bundles):
    return lambda *options: run("chat", tiny_bundles / "chat", "-p", GOOD, *CHAT, *options)


def test_an_answer_that_passes_is_the_one_without_a_guard(chat, tiny_guard, tmp_path):
    status, plain, _ = chat()
    assert status == 0 and plain.strip()
    log = tmp_path / "log"
    more = ("--guard-every", "4", "--guard-log", log, "--guard-log-text")
    status, out, _ = chat("--guard", tiny_guard, *NEVER, *more)
    assert (status, out) == (0, plain)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [x["on"] for x in lines] == ["input", *["output"] * (len(lines) - 1)] and len(lines) > 3
    answers = [x["response"] for x in lines[1:]]
    assert all(b.startswith(a) for a, b in itertools.pairwise(answers))
    assert answers[-1] == plain.removesuffix("\n")


def test_a_refused_message_gets_no_answer(chat, tiny_guard):
    status, out, err = chat("--guard", tiny_guard, *ALWAYS, "--guard-policy", "hate")
    assert (status, out) == (2, "")
    assert "the guard refused the message, because of hate speech" in err


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_refused_answer_is_not_shown(chat, tiny_guard, more):
    on = ("--guard-on", "output")
    status, out, err = chat("--guard", tiny_guard, *ALWAYS, *on, *more)
    assert (status, out) == (2, "")
    assert "the guard ended the answer, because of dangerous content, harassment" in err
