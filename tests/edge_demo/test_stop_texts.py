"""Texts that end an answer: the same, however the answer comes in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.errors import RequestError
from edge_demo.text.sampling import Sampler
from edge_demo.text.stop_texts import StopTexts, check_stop_texts
from tests.edge_demo.conftest import generator
from tests.edge_demo.test_generator import BOS, FIRST_BYTE, Script


def cut(text, stops):
    """The text up to the stop text that ends first, and whether there is one."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab\n😀", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n😀", min_size=1, max_size=4), max_size=3),
)
def test_an_answer_is_cut_where_the_whole_text_would_be(pieces, stops):
    watch, said = StopTexts(check_stop_texts(stops)), ""
    expected, found = cut("".join(pieces), stops)
    for piece in pieces:
        said += watch.push(piece)
        assert expected.startswith(said)
        if watch.found:
            break
    assert watch.found == found
    assert said + watch.flush() == expected


def test_what_cannot_become_a_stop_text_is_shown_at_once():
    watch = StopTexts(("END", "aab"))
    assert [watch.push(p) for p in ("aa", "a", "E", "N", "x", "aabc")] == [
        "",
        "a",
        "aa",
        "",
        "ENx",
        "",
    ]
    assert watch.found and watch.push("more") == watch.flush() == ""


@pytest.mark.parametrize(
    "texts, says",
    [("", "empty"), (["a", ""], "empty"), (["\ud800"], "UTF-8"), (["a" * 1001], "1,001"), (["a"] * 65, "65")],
)  # fmt: skip
def test_what_can_end_no_answer_is_refused(texts, says):
    with pytest.raises(RequestError, match=says):
        check_stop_texts([texts] if texts == "" else texts)
    assert check_stop_texts("END") == ("END",)


@pytest.fixture(scope="module")
def tiny(tiny_bundles):
    return generator(tiny_bundles / "gemma3-fp32")


def script(text):
    return Script(*(FIRST_BYTE + byte for byte in text.encode()), *range(50, 60))


@pytest.mark.parametrize(
    "said, stop, shown, reason, tokens",
    [
        ("a😀b", "😀", "a", "stop", 5),  # its last byte decides
        ("a😀b", "b", "a😀", "stop", 6),
        ("a😃b", "😀", "a😃b", "length", 6),  # three of four bytes are the same
        ("ab", "bc", "ab", "length", 2),  # what was held back comes when nothing more does
        ("ab", "ab", "", "stop", 2),
        ("a\n\nb", "\n\n", "a", "stop", 3),
    ],
)
def test_a_stop_text_ends_the_answer_across_tokens(tiny, said, stop, shown, reason, tokens):
    prompt = tiny.tokenizer.encode(stop)  # what the prompt has does not count
    stream = tiny.stream(prompt, script(said), len(said.encode()), stop=(stop,))
    whole, completion = "".join(piece.text for piece in stream), stream.completion
    assert whole == completion.text == shown
    assert (completion.finish_reason, len(completion.ids)) == (reason, tokens)
    assert tiny.engine.tokens == [*prompt, *completion.ids][:-1]  # nothing more was run


def test_an_unfinished_character_can_end_it_too(tiny):
    found = tiny.generate([BOS], script("a😀"), 3, stop="\ufffd")
    assert (found.text, found.finish_reason) == ("a", "stop")


def test_the_engine_goes_on_after_a_stop_text(tiny):
    plain = tiny.generate([BOS, 20, 30], Sampler(), 30)
    stop = plain.text[10:12]
    stopped = tiny.generate([BOS, 20, 30], Sampler(), 30, stop=stop)
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert tiny.generate([BOS, 20, 30], Sampler(), 30).ids == plain.ids


def test_commands_and_batches_stop_alike(tiny_bundles, run_json, run, tmp_path):
    bundle = tiny_bundles / "gemma3-fp32"
    options = ("--prompt", "The boat", "--max-tokens", 30)
    whole = run_json("generate", bundle, *options)["text"]
    first, second = whole[14:16], whole[8:10]
    expected = cut(whole, [first, second])[0]
    found = run_json("generate", bundle, *options, "--stop", first, "--stop", second)
    assert (found["text"], found["finish_reason"]) == (expected, "stop")
    lines = [
        {"prompt": "The boat", "stop": [first, second]},
        {"prompt": "The boat", "stop": first},
        {"prompt": "The boat"},
        {"prompt": "The boat", "stop": []},
    ]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--batch", tmp_path / "in", "--out", tmp_path / "out", "--max-tokens", 30)
    assert run("generate", bundle, *arguments, "--stop", second)[0] == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()]
    assert texts == [expected, cut(whole, [first])[0], cut(whole, [second])[0], whole]


def test_what_a_shell_has_left_of_a_line_break_is_told(tiny_bundles, run):
    options = ("--prompt", "The", "--max-tokens", 1, "--json")
    for stop, told in (("\\n", True), ("\n", False)):
        status, _, err = run("generate", tiny_bundles / "gemma3-fp32", *options, "--stop", stop)
        assert status == 0 and ("in bash write a line break as $'\\n'" in err) == told
