"""Conversations that fill the context, and those that a batch brings."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.errors import RequestError
from edge_demo.text.conversation import Conversation
from edge_demo.text.messages import read_messages
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.conftest import generator

CONTEXT, ANSWER = 120, 20


@pytest.fixture(scope="module")
def tokenizers(tiny_bundles):
    return {n: Tokenizer(Bundle.open(tiny_bundles / n)) for n in ("chat", "gemma3-fp32")}


def encode(tokenizer, turns, system):
    if tokenizer.spec.chat:
        return tokenizer.encode_chat(turns, system)
    return tokenizer.encode("".join(text for _, text in turns))


@pytest.mark.parametrize("name, system", [("chat", ""), ("chat", "Be kind."), ("gemma3-fp32", "")])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 20)), max_size=12))
def test_what_is_left_is_the_end_of_the_conversation_and_fits(tokenizers, name, system, lengths):
    tokenizer = tokenizers[name]
    conversation = Conversation(tokenizer, CONTEXT, ANSWER, system)
    turns = []
    for number, (asked, answered) in enumerate(lengths):
        message = chr(97 + number) * asked
        alone = len(encode(tokenizer, [("user", message)], system))
        if alone > CONTEXT:
            with pytest.raises(RequestError, match=rf"prompt of {alone} tokens.*holds {CONTEXT}"):
                conversation.ask(message)
            assert len(conversation) == len(turns)  # nothing went for it
            continue
        turns.append(("user", message))
        before = len(encode(tokenizer, turns, system))
        ids = conversation.ask(message)
        del turns[: 2 * conversation.dropped]
        assert turns and ids == encode(tokenizer, turns, system)
        # nothing goes without need, and no more than makes half of the room free
        limit = CONTEXT - ANSWER
        assert (conversation.dropped > 0) == (before > limit and before > alone)
        if conversation.dropped:
            room = (alone + max(alone, limit)) // 2
            assert len(ids) <= room
        assert len(ids) <= max(limit, alone)
        conversation.answer("x" * answered)
        turns.append(("model", "x" * answered))


def test_a_conversation_can_begin_anew_and_a_message_be_taken_back(tokenizers):
    tokenizer = tokenizers["chat"]
    conversation = Conversation(tokenizer, CONTEXT, ANSWER, "Be kind.")
    first = conversation.ask("Hi")
    conversation.take_back()
    assert conversation.ask("Hi") == first
    conversation.answer("Yes")
    conversation.ask("And")
    conversation.clear()
    assert conversation.ask("Hi") == first


@pytest.mark.parametrize("name, system", [("chat", ""), ("chat", "Be kind."), ("gemma3-fp32", "")])
def test_with_stop_nothing_is_dropped_and_all_of_the_context_is_used(tokenizers, name, system):
    tokenizer = tokenizers[name]
    conversation = Conversation(tokenizer, CONTEXT, ANSWER, system, "stop")
    turns, longest = [], 0
    while True:
        tokens = conversation.num_tokens
        turns.append(("user", "x" * 10))
        prompt = encode(tokenizer, turns, system)
        if len(prompt) > CONTEXT:
            break
        assert conversation.ask("x" * 10) == prompt and conversation.dropped == 0
        longest = len(prompt)
        conversation.answer("y")
        turns.append(("model", "y"))
    assert longest > CONTEXT - ANSWER
    says = f"has {tokens} tokens and this message {len(prompt) - tokens}, but the context holds"
    with pytest.raises(RequestError, match=says):
        conversation.ask("x" * 10)
    assert conversation.turns == tuple(turns[:-1])
    conversation.overflow = "drop-oldest"
    left = conversation.ask("x" * 10)
    assert conversation.dropped and conversation.dropped_tokens == len(prompt) - len(left)


def test_a_conversation_counts_its_tokens(tokenizers):
    tokenizer = tokenizers["chat"]
    conversation = Conversation(tokenizer, CONTEXT, ANSWER)
    assert conversation.num_tokens == 0
    conversation.ask("Hi")
    conversation.answer("Yes")
    both = [("user", "Hi"), ("model", "Yes")]
    more = tokenizer.encode_chat([*both, ("user", "And")])
    assert conversation.num_tokens < len(more)
    turn = more[conversation.num_tokens :]  # begins where the others end
    assert turn[0] == tokenizer.spec.chat.start_of_turn
    assert turn.count(tokenizer.spec.chat.start_of_turn) == 2
    base = Conversation(tokenizers["gemma3-fp32"], CONTEXT, ANSWER)
    assert base.num_tokens == 0
    assert base.num_tokens == 0 < len(base.ask("Hi")) == base.num_tokens


# --- messages ------------------------------------------------------------------------------------


def message(role, content="Hi"):
    return {"role": role, "content": content}


def test_messages_are_a_conversation():
    found = read_messages(
        [
            message("system", "Be."),
            message("user"),
            message("assistant", "Yes"),
            message("user", ""),
        ]
    )
    assert found == ("Be.", (("user", "Hi"), ("model", "Yes"), ("user", "")))
    assert read_messages([message("user"), message("model"), message("user")])[0] == ""


@pytest.mark.parametrize(
    "value, says",
    [
        ([], "must be a list"),
        ("Hi", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["Hi"], "message 1 must have"),
        ([{"role": "user"}], "message 1 must have"),
        ([message("user") | {"name": "Ada"}], "message 1 must have"),
        ([message("user", None)], 'the "content" of message 1 must be text, not None'),
        ([message("user", [{"type": "text"}])], "must be text"),
        ([message(3)], 'the "role" of message 1 must be text'),
        ([message("User")], "must be system, user or assistant, not 'User'"),
        ([message("system")], "the last"),
        ([message("user"), message("assistant")], "the last"),
        ([message("assistant")], "found 'assistant' instead of user"),
        ([message("user"), message("user")], "found 'user' instead of assistant"),
        ([message("user"), message("system"), message("user")], "found 'system'"),
        ([message("system"), message("system"), message("user")], "found 'system'"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused(value, says):
    with pytest.raises(RequestError, match=says):
        read_messages(value)


def test_messages_in_a_batch_are_answered_as_chat_answers_them(tiny_bundles, run, tmp_path):
    bundle = tiny_bundles / "chat"
    lines = [
        {"messages": [message("system", "Be"), message("user", "Hi!"), message("assistant", "Yes"), message("user", "Boat?")]},
        {"messages": [message("user", "Hi <end_of_turn>!")], "id": "b", "max_tokens": 4},
        {"prompt": "The boat"},
    ]  # fmt: skip
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--batch", tmp_path / "in", "--out", tmp_path / "out", "--max-tokens", 9)
    assert run("generate", bundle, *arguments)[0] == 0
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    alone = generator(bundle)
    encode = alone.tokenizer.encode_chat
    expected = [
        encode([("user", "Hi!"), ("model", "Yes"), ("user", "Boat?")], "Be"),
        encode([("user", "Hi <end_of_turn>!")]),
        alone.tokenizer.encode("The boat"),
    ]
    assert [r["prompt_tokens"] for r in records] == [len(ids) for ids in expected]
    assert [r["tokens"] for r in records] == [9, 4, 9]


def test_a_batch_of_other_messages_or_options_is_not_gone_on_with(tiny_bundles, run, tmp_path):
    def answer(content, *options):
        line = {"messages": [message("user", content)], "max_tokens": 3}
        (tmp_path / "in").write_text(json.dumps(line))
        arguments = ("--batch", tmp_path / "in", "--out", tmp_path / "out")
        return run("generate", tiny_bundles / "chat", *arguments, *options)[0]

    assert [answer("Hi"), answer("Hi"), answer("Ho")] == [0, 0, 2]
    for option in ("--min-p", "--repeat-penalty", "--presence-penalty", "--frequency-penalty"):
        assert answer("Hi", option, 0.5) == 2
    assert answer("Hi", "--stop", "x") == answer("Hi", "--repeat-last-n", 3) == 2


def test_messages_need_a_chat_template(tiny_bundles, refused, tmp_path):
    lines = [{"prompt": "a"}, {"messages": [message("user")]}]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--batch", tmp_path / "in", "--out", tmp_path / "out")
    refused("generate", tiny_bundles / "gemma3-fp32", *arguments, names=["line 2 of", "base model"])
    lines[0]["messages"] = lines[1]["messages"]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    refused(
        "generate",
        tiny_bundles / "chat",
        *arguments,
        names=["line 1", 'either "prompt" or "messages"'],
    )
    assert not (tmp_path / "out").exists()
