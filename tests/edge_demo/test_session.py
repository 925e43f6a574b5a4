"""A chat session against a generator that is given the whole conversation each time."""

from __future__ import annotations

import pytest

from edge_demo.errors import RequestError
from edge_demo.text.sampling import Sampler
from edge_demo.text.session import ChatSession
from tests.edge_demo.conftest import generator

GREEDY = Sampler()


@pytest.fixture
def chat(tiny_bundles):
    return generator(tiny_bundles / "chat")


def said(session, message, tokens=None):
    """The answer to a message, given up after some tokens, and kept."""
    stream = session.send(message)
    for number, _ in enumerate(stream, start=1):
        if number == tokens:
            stream.close()
            break
    assert session.keep(stream.completion)
    return stream.completion


@pytest.mark.parametrize("system", ["", "  Be brief.\n"])
def test_a_turn_continues_all_turns_before_it_and_runs_only_what_is_new(chat, tiny_bundles, system):
    session = ChatSession(chat, GREEDY, 6, system)
    first, second = said(session, "Is it open?"), said(session, "And tomorrow?")
    turns = [("user", "Is it open?"), ("model", first.text), ("user", "And tomorrow?")]
    assert first.prompt_ids == chat.tokenizer.encode_chat(turns[:1], system)
    assert second.prompt_ids == chat.tokenizer.encode_chat(turns, system)
    assert second.reused_tokens >= len(first.prompt_ids) and len(session) == 4
    alone = generator(tiny_bundles / "chat").generate(second.prompt_ids, GREEDY, 6)
    assert alone.ids == second.ids and second.finish_reason == alone.finish_reason


def test_an_answer_that_was_given_up_is_a_turn_if_anything_was_said(chat):
    session = ChatSession(chat, GREEDY, 6)
    half = said(session, "Is it open?", tokens=3)
    assert half.finish_reason == "interrupted" and len(half.ids) == 3 and len(session) == 2
    nothing = session.send("And tomorrow?")
    assert len(session) == 3
    assert not session.keep(nothing.completion)  # nothing of it was run
    assert len(session) == 2


def test_a_message_too_long_changes_nothing(chat):
    session = ChatSession(chat, GREEDY, 6)
    first = said(session, "Is it open?")
    with pytest.raises(RequestError, match="tokens"):
        session.send("open " * 10_000)
    assert len(session) == 2
    again = session.send("And tomorrow?")
    assert again.completion.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids


def test_clear_begins_as_a_new_session_does(chat):
    session = ChatSession(chat, GREEDY, 6, "Be brief.")
    first = said(session, "Is it open?")
    said(session, "And tomorrow?")
    session.clear()
    assert len(session) == 0 and chat.engine.tokens == session.system_ids
    assert said(session, "Is it open?").ids == first.ids
