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


def test_undo_leaves_what_was_never_said(chat, tiny_bundles):
    session = ChatSession(chat, GREEDY, 6)
    assert session.undo() is None
    said(session, "Is it open?")
    turns = session.turns
    said(session, "And tomorrow?")
    assert session.undo() == "And tomorrow?" and session.turns == turns
    again = said(session, "Why?")
    other = ChatSession(generator(tiny_bundles / "chat"), GREEDY, 6)
    said(other, "Is it open?")
    never = said(other, "Why?")
    assert again.prompt_ids == never.prompt_ids and again.ids == never.ids
    assert again.reused_tokens >= never.reused_tokens > 0


def test_an_answer_can_be_given_again_and_runs_its_message_only(chat):
    session = ChatSession(chat, GREEDY, 6)
    with pytest.raises(RequestError, match="no answer yet"):
        session.send_again()
    said(session, "Is it open?")
    second = said(session, "And tomorrow?")
    stream = session.send_again()
    assert len(session) == 3
    for _ in stream:
        pass
    assert session.keep(stream.completion) and len(session) == 4
    assert stream.completion.ids == second.ids
    assert stream.completion.reused_tokens >= second.reused_tokens > 0
    turns = session.turns
    session.send("Why?")
    session.take_back()
    assert session.turns == turns


def test_an_answer_that_is_not_given_again_is_the_former_one(chat):
    session = ChatSession(chat, GREEDY, 6)
    said(session, "Is it open?")
    said(session, "And tomorrow?")
    turns = session.turns
    stream = session.send_again()
    assert not session.keep(stream.completion)  # nothing of it was run
    assert session.turns == turns
    session.send_again()
    session.take_back()
    session.take_back()  # there is nothing more to take back
    assert session.turns == turns
    third = said(session, "Why?")
    assert third.prompt_ids == chat.tokenizer.encode_chat((*turns, ("user", "Why?")))
    assert session.undo() == "Why?" and session.turns == turns
    assert [session.undo(), session.undo()] == ["And tomorrow?", "Is it open?"]


def test_after_an_answer_that_was_given_up_only_what_is_new_is_run(chat):
    session = ChatSession(chat, GREEDY, 6)
    said(session, "Is it open?")
    half = said(session, "And tomorrow?", tokens=3)
    after = said(session, "Why?")
    assert after.reused_tokens >= len(half.prompt_ids)
    alone = generator(chat.engine.bundle.path).generate(after.prompt_ids, GREEDY, 6)
    assert alone.ids == after.ids


def test_another_conversation_is_gone_on_with(chat):
    session = ChatSession(chat, GREEDY, 6)
    said(session, "Is it open?")
    turns = session.turns
    with pytest.raises(RequestError, match=r"has [\d,]+ tokens, but the context holds 128"):
        session.replace("Be brief.", [("user", "boat " * 200), ("model", "")])
    assert session.turns == turns and session.system == ""
    others = (("user", "Boat?"), ("model", "No."))
    session.replace("Be brief.", others)
    answer = said(session, "Why?")
    assert answer.prompt_ids == chat.tokenizer.encode_chat((*others, ("user", "Why?")), "Be brief.")
    assert session.system_ids == chat.tokenizer.encode_system("Be brief.")
    session.undo()
    assert session.undo() == "Boat?" and len(session) == 0


def test_the_most_of_an_answer_and_the_sampler_can_be_changed(chat):
    session = ChatSession(chat, GREEDY, 6)
    session.max_tokens = 2
    assert len(said(session, "Is it open?").ids) == 2
    session.sampler = Sampler(temperature=1, top_k=1)
    assert session.undo() and len(said(session, "Is it open?").ids) == 2
