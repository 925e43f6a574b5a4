"""`--prompt-cache FILE` of `generate` and `chat`, and `--system`, as a user gives them."""

from __future__ import annotations

import json
import os

import pytest

from tests.edge_demo.conftest import generator
from tests.edge_demo.test_commands import edge_demo, reports, shell
from tests.edge_demo.test_prompt_cache import rewrite


@pytest.fixture
def tiny(tiny_bundles):
    return tiny_bundles / "gemma3-int8"


# --- the options ---------------------------------------------------------------------------------

PROMPT = "The gardener waters the young trees before the sun is high."


@pytest.fixture
def prompt(tiny, tmp_path):
    """Options of `generate`, and what it says without a cache."""
    options = ("--prompt", PROMPT, "--max-tokens", 12, "--json")
    expected = json.loads(edge_demo("generate", tiny, *options)[0])
    return [*options, "--prompt-cache", tmp_path / "p"], expected


def generate(*arguments):
    out, err = edge_demo("generate", *arguments)
    return json.loads(out), err


def test_the_second_run_begins_where_the_first_ended_its_prompt(tiny, prompt, tmp_path):
    options, expected = prompt
    length = len(expected["prompt_ids"])
    assert expected["prompt_cache"] is None and expected["reused_tokens"] == 0
    first, err = generate(tiny, *options)
    assert (first["ids"], err) == (expected["ids"], "")
    assert first["prompt_cache"] | {"load_s": 0} == {"loaded_tokens": 0, "load_s": 0, "saved": True}
    written = (tmp_path / "p").stat().st_mtime_ns
    second, err = generate(tiny, *options)
    assert (second["ids"], err) == (expected["ids"], "")
    assert second["reused_tokens"] == length - 1
    assert second["prompt_cache"]["loaded_tokens"] == length - 1  # the last one is always run
    assert not second["prompt_cache"]["saved"]
    assert (tmp_path / "p").stat().st_mtime_ns == written  # there was nothing new to write
    longer, _ = generate(tiny, *options[2:], "--prompt", PROMPT + " A boat")
    assert longer["prompt_cache"]["saved"]
    assert os.listdir(tmp_path) == ["p"]


def test_a_cache_that_is_only_read_stays_as_it_is(tiny, prompt, tmp_path):
    options, expected = prompt
    _, err = generate(tiny, *options, "--prompt-cache-ro")
    assert "does not exist" in err and err.count("\n") == 1 and not (tmp_path / "p").exists()
    generate(tiny, *options)
    before = (tmp_path / "p").read_bytes()
    other, err = generate(tiny, *options[2:], "--prompt", "The gardener sings", "--prompt-cache-ro")
    assert err == "" and not other["prompt_cache"]["saved"]
    assert (tmp_path / "p").read_bytes() == before
    assert generate(tiny, *options, "--prompt-cache-ro")[0]["ids"] == expected["ids"]


@pytest.mark.parametrize("spoil", ["another bundle", "damaged", "too long"])
def test_a_cache_that_cannot_be_used_is_told_and_made_anew(
    tiny, tiny_bundles, prompt, tmp_path, spoil
):
    options, expected = prompt
    if spoil == "another bundle":
        generate(tiny_bundles / "gemma3-fp32", *options)
    else:
        generate(tiny, *options)
    if spoil == "damaged":
        data = bytearray((tmp_path / "p").read_bytes())
        data[-1] ^= 1
        (tmp_path / "p").write_bytes(data)
    if spoil == "too long":
        rewrite(tmp_path / "p", lambda h: h["tokens"].update(shape=[129]))
    again, err = generate(tiny, *options, "--prompt-cache-ro")
    assert again["ids"] == expected["ids"] and again["reused_tokens"] == 0
    assert err.count("\n") == 1 and err.endswith("the prompt is run without the cache\n")
    again, err = generate(tiny, *options)
    assert again["ids"] == expected["ids"] and again["reused_tokens"] == 0
    assert err.count("\n") == 1 and err.endswith("the file is recreated\n")
    assert spoil in err or "129 tokens" in err
    again, err = generate(tiny, *options)
    assert (again["ids"], err) == (expected["ids"], "") and again["reused_tokens"] > 0


def test_a_disk_that_is_full_costs_the_cache_and_not_the_answer(tiny, prompt, tmp_path):
    options, expected = prompt
    generate(tiny, *options[2:], "--prompt", "The boat")
    before = (tmp_path / "p").read_bytes()
    status, out, err = shell('ulimit -f 16; "$@"', "generate", tiny, *options)
    assert status == 0 and json.loads(out)["ids"] == expected["ids"]
    assert err.count("\n") == 1 and "cannot be written: File too large" in err
    assert (tmp_path / "p").read_bytes() == before and os.listdir(tmp_path) == ["p"]


def test_what_is_no_prompt_cache_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "letter").write_text("Dear Ada, this is the only copy I have of this letter.")
    (tmp_path / "short").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("letter", "not a prompt cache"), ("short", "not a prompt cache"), ("pipe", "not a file"),
        (".", "not a file"), ("none/p", "is not a folder"), ("letter/p", "is not a folder"),
    ):  # fmt: skip
        options = ("--prompt", "The", "--prompt-cache", tmp_path / name)
        for mode in ((), ("--prompt-cache-ro",)) if "/" not in name else ((),):
            _, err = edge_demo("generate", tiny, *options, *mode, status=2)
            assert err.count("\n") == 1 and says in err and str(tmp_path) in err
    assert (tmp_path / "letter").read_text().endswith("letter.")
    _, err = edge_demo("generate", tiny, "--prompt", "The", "--prompt-cache-ro", status=2)
    assert "--prompt-cache FILE" in err


# --- chat ----------------------------------------------------------------------------------------

SYSTEM = "Seven small stones lay on the table."


def test_a_system_text_stands_before_the_first_message(tiny_bundles):
    tokenizer = generator(tiny_bundles / "chat").tokenizer
    turns = [("user", " Hi! "), ("model", "Yes."), ("user", "Boat?")]
    told = [("user", f"{SYSTEM}\n\nHi!"), *turns[1:]]
    assert tokenizer.encode_chat(turns, SYSTEM) == tokenizer.encode_chat(told)
    assert tokenizer.encode_chat(turns, "") == tokenizer.encode_chat(turns)
    beginning = tokenizer.encode_system(SYSTEM)
    assert tokenizer.encode_chat(turns, SYSTEM)[: len(beginning)] == beginning


def test_chat_keeps_its_system_text_and_begins_with_it(tiny_bundles, tmp_path):
    bundle = tiny_bundles / "chat"
    options = ("--json", "--max-tokens", 4, "--seed", 5, "--system", SYSTEM)
    plain = reports(edge_demo("chat", bundle, *options, stdin="Hi!\0Boat?\n")[0])
    cached = (*options, "--prompt-cache", tmp_path / "p")
    encode = generator(bundle).tokenizer
    beginning = encode.encode_system(SYSTEM)
    assert plain[0]["prompt_ids"] == encode.encode_chat([("user", "Hi!")], SYSTEM)
    assert plain[0]["reused_tokens"] == len(beginning)
    edge_demo("chat", bundle, *cached, stdin="")  # the text alone is enough to keep it
    before = (tmp_path / "p").read_bytes()
    found = reports(edge_demo("chat", bundle, *cached, stdin="Hi!\0Boat?\n")[0])
    assert [r["ids"] for r in found] == [r["ids"] for r in plain]
    assert found[0]["prompt_cache"]["loaded_tokens"] == len(beginning)
    assert not found[0]["prompt_cache"]["saved"]
    assert (tmp_path / "p").read_bytes() == before


def test_chat_without_a_system_text_keeps_the_first_message(tiny_bundles, tmp_path):
    bundle = tiny_bundles / "chat"
    options = ("--json", "--max-tokens", 4, "--prompt-cache", tmp_path / "p")
    first = reports(edge_demo("chat", bundle, *options, stdin="Hi!\0Boat?\n")[0])[0]
    assert first["prompt_cache"]["saved"]
    (again,) = reports(edge_demo("chat", bundle, *options, stdin="Hi!\n")[0])
    assert again["prompt_cache"]["loaded_tokens"] == len(first["prompt_ids"]) - 1
    assert again["reused_tokens"] == len(first["prompt_ids"]) - 1


def test_a_system_text_that_cannot_be_used_is_refused(tiny, tiny_bundles):
    _, err = edge_demo("chat", tiny, "--prompt", "Hi", "--system", SYSTEM, status=2)
    assert "base model" in err and "--system" in err
    _, err = edge_demo(
        "chat", tiny_bundles / "chat", "--prompt", "Hi", "--system", SYSTEM * 20, status=2
    )
    assert "context holds 128" in err
