"""Many prompts from a file: their answers, and what a run that ends early leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import TokenRunner
from edge_demo.errors import RequestError
from edge_demo.text.batch import BatchRunner
from edge_demo.text.batch_items import Item, read_items
from edge_demo.text.batch_results import Results
from edge_demo.text.sampling import Sampler
from edge_demo.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.edge_demo.conftest import generator
from tests.edge_demo.test_commands import EDGE_DEMO, edge_demo, shell

DEFAULTS = Item(0, None, "", 20, 0.0, 0, 1.0, 0)
PROMPTS = [
    {"prompt": "The gardener waters", "id": "first"},
    {"prompt": "The boat", "max_tokens": 3, "id": 17},
    {"prompt": "The old bridge was built of oak, the new one is built of", "temperature": 1.0},
    {"prompt": ""},
    {"prompt": "The old bridge", "temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 3},
    {"prompt": "The é😀", "max_tokens": 40},
    {"prompt": "The boat", "temperature": 1.0},
    {"prompt": "The boat", "temperature": 1.0},
    {"prompt": "Seven small stones", "max_tokens": 60},
    {"prompt": "The boat", "repeat_penalty": 1.5, "min_p": 0.02, "temperature": 1.5},
    {
        "prompt": "The boat",
        "frequency_penalty": 0.5,
        "stop": ["J", "\ufffd\ufffd"],
        "max_tokens": 30,
    },
]


@pytest.fixture
def tiny(tiny_bundles):
    return tiny_bundles / "gemma3-fp32"


def write(path, prompts):
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole_lines(data):
    return [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.fixture
def batch(tiny, tmp_path):
    """The command's arguments for some prompts; options come after them."""
    source = write(tmp_path / "in.jsonl", PROMPTS)
    options = ("--batch", source, "--out", tmp_path / "out.jsonl", "--max-tokens", 12)
    return ["generate", tiny, "--threads", 1, *options]


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_every_prompt_gets_the_answer_that_it_gets_alone(tiny, batch, tmp_path, size):
    out, err = edge_demo(*batch, "--batch-size", size, "--json")
    found = lines(tmp_path / "out.jsonl")
    alone = generator(tiny)
    items = read_items(tmp_path / "in.jsonl", dataclasses.replace(DEFAULTS, max_tokens=12))
    for number, (record, prompt, item) in enumerate(zip(found, PROMPTS, items, strict=True)):
        assert list(record) == [
            "index", "id", "text", "finish_reason", "prompt_tokens", "tokens", "key",
        ]  # fmt: skip
        assert record["index"] == number and record["id"] == prompt.get("id")
        ids = alone.tokenizer.encode(prompt["prompt"])
        asked = {k: v for k, v in prompt.items() if k not in ("prompt", "id", "max_tokens", "stop")}
        sampler = Sampler(**asked | {"seed": item.seed})
        limit, stop = prompt.get("max_tokens", 12), prompt.get("stop", ())
        expected = alone.generate(ids, sampler, limit, stop=stop)
        assert record["text"] == expected.text
        assert record["finish_reason"] == expected.finish_reason
        assert (record["prompt_tokens"], record["tokens"]) == (len(ids), len(expected.ids))
    assert found[6]["text"] != found[7]["text"]  # each has a seed of its own
    report = json.loads(out)
    assert report["prompts"] == report["done"] == len(PROMPTS)
    assert report["done_before"] == report["errors"] == 0
    assert report["tokens"] == sum(record["tokens"] for record in found)
    assert err == "" and not [n for n in os.listdir(tmp_path) if n.endswith(".ahead")]


def test_greedy_batches_run_the_graph_of_candidates(tiny, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": w} for w in ("The", "A boat", "Bread")])
    arguments = ("generate", tiny, "--batch", source, "--max-tokens", 9)
    edge_demo(*arguments, "--out", tmp_path / "few")
    edge_demo(*arguments, "--out", tmp_path / "all", "--temperature", 1e-9)
    few, everything = ([r["text"] for r in lines(tmp_path / n)] for n in ("few", "all"))
    assert few == everything and len(set(few)) == 3


def test_a_prompt_ends_at_a_stop_token_and_at_the_end_of_the_context(tiny_bundles, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "The boat"}, {"prompt": "The gar"}])
    bundle = tiny_bundles / "short"
    edge_demo("generate", bundle, "--batch", source, "--out", tmp_path / "out")
    alone = generator(bundle)
    for record, prompt in zip(lines(tmp_path / "out"), ("The boat", "The gar"), strict=True):
        expected = alone.generate(alone.tokenizer.encode(prompt), Sampler(), 128)
        assert record["finish_reason"] == expected.finish_reason == "context"
        assert record["text"] == expected.text


def test_a_prompt_that_does_not_fit_has_an_error_and_the_others_have_answers(
    tiny_bundles, tmp_path
):
    prompts = [
        {"prompt": "The boat"},
        {"prompt": "gardener " * 20, "id": "long"},
        {"prompt": "The"},
    ]
    source = write(tmp_path / "in.jsonl", prompts)
    arguments = ("generate", tiny_bundles / "short", "--batch", source, "--out", tmp_path / "out")
    for _ in range(2):  # the second run finds it there
        _, err = edge_demo(*arguments, "--max-tokens", 2, status=1)
        first, second, third = lines(tmp_path / "out")
        assert "context holds 16" in second["error"] and second["id"] == "long"
        assert "text" not in second and first["tokens"] == third["tokens"] == 2
        assert "1 of them failed" in err and "Traceback" not in err


def test_what_all_prompts_begin_with_is_run_once(tiny, tmp_path, monkeypatch):
    computed = []
    add = TokenRunner.add  # runs all of a prompt but its last token
    monkeypatch.setattr(
        TokenRunner, "add",
        lambda engine, ids, *told: computed.append(len(ids)) or add(engine, ids, *told),
    )  # fmt: skip
    beginning = "When the rain stopped, the children ran out to look for "
    items = [
        Item(i, None, beginning + word, 4, 0.0, 0, 1.0, 0)
        for i, word in enumerate(["snails", "the sun", "bread", "a cold kitchen", ""])
    ]
    bundle = Bundle.open(tiny)
    runner = BatchRunner(bundle, Tokenizer(bundle), items, 2, threads=1)
    assert len(runner.shared) > 10
    found = {item.index: answer for item, answer in runner.run(items)}
    assert sum(computed) == len(runner.shared) + sum(
        len(a.prompt_ids) - len(runner.shared) - 1 for a in found.values()
    )
    alone = generator(tiny)
    for item in items:
        ids = alone.tokenizer.encode(item.prompt)
        assert found[item.index].ids == alone.generate(ids, Sampler(), 4).ids
        assert found[item.index].reused_tokens == len(runner.shared)


# --- resuming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_bundles, tmp_path_factory):
    """What a run that nothing interrupts writes."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "in.jsonl", PROMPTS)
    edge_demo(
        "generate", tiny_bundles / "gemma3-fp32", "--threads", 1, "--batch", folder / "in.jsonl",
        "--out", folder / "out.jsonl", "--max-tokens", 12,
    )  # fmt: skip
    return (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 4, len(PROMPTS) - 1, len(PROMPTS)])
@pytest.mark.parametrize("torn", [0, 1, 12, 60])
def test_a_run_goes_on_after_whole_lines_and_drops_a_torn_one(batch, whole, tmp_path, kept, torn):
    ends = [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    (tmp_path / "out.jsonl").write_bytes(whole[: ends[kept] + torn])
    out, err = edge_demo(*batch, "--json")
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert json.loads(out)["done_before"] == kept
    assert (f"{kept} of {len(PROMPTS)}" in err) == (kept > 0)


def test_whatever_kills_it_it_loses_what_was_in_flight_and_ends_the_same(tiny, tmp_path):
    """A real process, killed again and again until it has ended by itself."""
    prompts = [{"prompt": f"The boat {n}", "max_tokens": 20 + 37 * n % 80} for n in range(24)]
    source = write(tmp_path / "in.jsonl", prompts)
    arguments = ["generate", tiny, "--threads", 1, "--batch", source, "--temperature", 1]
    edge_demo(*arguments, "--out", tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    out, ahead = tmp_path / "out", tmp_path / ".out.ahead"
    random = np.random.default_rng(0)
    kept, kills = set(), 0
    while True:
        process = subprocess.Popen(
            [*EDGE_DEMO, *map(str, arguments), "--out", str(out)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        # until it has written something more, and a random while
        size = [f.stat().st_size if f.exists() else 0 for f in (out, ahead)]
        while process.poll() is None and size == [
            f.stat().st_size if f.exists() else 0 for f in (out, ahead)
        ]:
            time.sleep(0.001)
        time.sleep(random.random() * 0.03)
        process.kill()
        err = process.communicate()[1].decode()
        assert "Traceback" not in err
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, err
            break
        kills += 1
        written = out.read_bytes()
        assert whole.startswith(written)  # in order, and what an uninterrupted run writes
        waiting = ahead.read_bytes() if ahead.exists() else b""
        now = {json.loads(line)["index"] for line in whole_lines(written) + whole_lines(waiting)}
        assert now >= kept  # what was once on the disk stays
        kept = now
    assert out.read_bytes() == whole and kills >= 5
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out", "whole"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(order=st.permutations(range(6)), killed=st.integers(0, 6), torn=st.integers(0, 30))
def test_results_are_in_order_whatever_order_they_come_in(tmp_path_factory, order, killed, torn):
    path = tmp_path_factory.mktemp("results") / "out"
    ahead = path.with_name(".out.ahead")
    keys = [f"key {n}" for n in range(6)]
    first = Results(path, keys)
    for index in order[:killed]:
        first.add(index, {"text": str(index)})
    # as if it had been killed in the middle of the next line
    for file in (first._file, first._ahead):
        file.write(b'{"index": 3, "text": "3", "key": "ke'[:torn])
        file.close()
    with Results(path, keys) as results:
        assert results.done == set(order[:killed])
        for index in order[killed:]:
            results.add(index, {"text": str(index)})
            there = lines(path)
            assert [r["index"] for r in there] == list(range(len(there)))
            assert len(there) + ahead.read_bytes().count(b"\n") >= len(results.done)
    expected = [{"index": n, "text": str(n), "key": keys[n]} for n in range(6)]
    assert lines(path) == expected and not ahead.exists()


@pytest.mark.parametrize("change", ["prompt", "seed", "bundle", "id", "fewer", "options"])
def test_results_of_something_else_are_not_gone_on_with(
    batch, whole, tiny_bundles, tmp_path, change
):
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole)
    prompts = [dict(prompt) for prompt in PROMPTS]
    options = []
    if change == "prompt":
        prompts[4]["prompt"] += "."
    elif change == "seed":
        prompts[4]["seed"] = 4
    elif change == "id":
        prompts[4]["id"] = "another"
    elif change == "fewer":
        del prompts[4:]
    elif change == "bundle":
        batch[1] = tiny_bundles / "gemma3-int8"
    else:
        options = ["--max-tokens", 13]
    write(tmp_path / "in.jsonl", prompts)
    _, err = edge_demo(*batch, *options, status=2)
    line = 1 if change in ("bundle", "options") else 5
    assert f"line {line} of {out}" in err and "--overwrite" in err and err.count("\n") == 1
    assert out.read_bytes() == whole
    edge_demo(*batch, *options, "--overwrite")
    assert len(lines(out)) == len(prompts) and out.read_bytes() != whole


def test_somebodys_file_is_not_taken_for_results(batch, tmp_path):
    for content in (b"Dear Ada,\nthis is a letter.\n", b"Dear Ada", b'{"a": 1}\n', b"[]\n", b"\n"):
        (tmp_path / "out.jsonl").write_bytes(content)
        _, err = edge_demo(*batch, status=2)
        assert "line 1 of" in err and err.count("\n") == 1
        assert (tmp_path / "out.jsonl").read_bytes() == content


def test_two_runs_do_not_write_one_file(batch, tmp_path):
    with Results(tmp_path / "out.jsonl", ["key"]):
        _, err = edge_demo(*batch, status=2)
        assert "another run" in err and err.count("\n") == 1


def test_a_disk_that_is_full_ends_it_in_a_line_and_it_can_go_on(batch, whole, tmp_path):
    status, _, err = shell('ulimit -f 1; "$@"', *batch)
    assert status == 1 and err.count("\n") == 1
    assert "File too large" in err and "run the same command again to continue" in err
    assert (tmp_path / "out.jsonl").stat().st_size == 1024 < len(whole)
    edge_demo(*batch)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_ctrl_c_ends_it_and_it_can_go_on(tiny, tmp_path):
    prompts = [{"prompt": f"The boat {n}", "max_tokens": 100} for n in range(24)]
    source = write(tmp_path / "in.jsonl", prompts)
    arguments = ["generate", tiny, "--batch", source, "--out", tmp_path / "out"]
    process = subprocess.Popen([*EDGE_DEMO, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE)
    while not (tmp_path / "out").exists() or not (tmp_path / "out").stat().st_size:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1].decode()
    assert (
        process.returncode == 130
        and "run the same command again to continue" in err
        and "Traceback" not in err
    )
    there = lines(tmp_path / "out")
    assert 0 < len(there) < len(prompts)
    _, err = edge_demo(*arguments)
    assert lines(tmp_path / "out")[: len(there)] == there
    assert len(lines(tmp_path / "out")) == len(prompts)


# --- the file of prompts -------------------------------------------------------------------------


def read(tmp_path, content):
    (tmp_path / "in").write_bytes(content)
    return read_items(tmp_path / "in", DEFAULTS)


def test_lines_may_be_empty_and_the_last_one_without_a_line_break(tmp_path):
    first, second = read(
        tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r\n\n   \n{"prompt": "\\ud800", "id": null}'
    )
    assert (first.index, first.prompt, first.max_tokens) == (0, "a", 20)
    assert (second.index, second.prompt, second.id) == (1, "\ud800", None)
    assert len(second.key("f")) == 32 and second.key("f") != second.key("g") != first.key("g")


def test_seeds_are_of_the_files_seed_and_the_place(tmp_path):
    content = b'{"prompt": "a"}\n' * 3 + b'{"prompt": "a", "seed": 5}\n'
    first = [item.seed for item in read(tmp_path, content)]
    assert len(set(first)) == 4 and first[3] == 5
    assert [item.seed for item in read(tmp_path, content)] == first
    assert [item.seed for item in read(tmp_path, content[:32])] == first[:2]
    other = read_items(tmp_path / "in", dataclasses.replace(DEFAULTS, seed=1))
    assert other[0].seed != first[0]


@pytest.mark.parametrize(
    "line, says",
    [
        (b"{", "not JSON"),
        (b"caf\xe9", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "a", "top_k": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "object"),
        (b'"a"', "object"),
        (b'{"id": 1}', 'with either "prompt" or "messages"'),
        (b'{"prompt": 1}', '"prompt" must be text, not 1'),
        (b'{"prompt": null}', '"prompt" must be text'),
        (b'{"prompt": "a", "max_token": 1}', "'max_token'"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "either"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "without a chat template"),
        (b'{"messages": "a"}', '"messages" must be a list of messages, not a'),
        (b'{"prompt": "a", "stop": ""}', "stop text must not be empty"),
        (b'{"prompt": "a", "stop": [""]}', "stop text must not be empty"),
        (b'{"prompt": "a", "stop": ["a", 1]}', '"stop" must be text, or a list of texts'),
        (b'{"prompt": "a", "stop": null}', '"stop" must be text, or a list of texts, not None'),
        (b'{"prompt": "a", "stop": "\\ud800"}', "must be valid UTF-8"),
        (b'{"prompt": "a", "min_p": 2}', "min-p must be between 0 and 1, not 2"),
        (b'{"prompt": "a", "repeat_penalty": 0}', "repeat-penalty must be between 0.1 and 10"),
        (b'{"prompt": "a", "presence_penalty": 3}', "presence-penalty must be between -2 and 2"),
        (b'{"prompt": "a", "frequency_penalty": true}', '"frequency_penalty" must be a number'),
        (b'{"prompt": "a", "repeat_last_n": 1.5}', '"repeat_last_n" must be a whole number'),
        (b'{"prompt": "a", "repeat_last_n": -2}', "repeat-last-n must be"),
        (b'{"prompt": "a", "max_tokens": 0}', '"max_tokens" must be positive, not 0'),
        (b'{"prompt": "a", "max_tokens": 1.5}', '"max_tokens" must be a whole number, not 1.5'),
        (b'{"prompt": "a", "max_tokens": true}', '"max_tokens" must be a whole number, not True'),
        (b'{"prompt": "a", "temperature": "1"}', '"temperature" must be a number'),
        (b'{"prompt": "a", "temperature": NaN}', "temperature must be between"),
        (b'{"prompt": "a", "temperature": -1}', "temperature must be between"),
        (b'{"prompt": "a", "top_p": 0}', "top-p must be"),
        (b'{"prompt": "a", "top_k": -1}', "top-k must not be negative"),
        (b'{"prompt": "a", "top_k": null}', '"top_k" must be a whole number, not None'),
        (b'{"prompt": "a", "seed": -1}', "seed must not be negative"),
        (b'{"prompt": "a", "id": 1.5}', '"id" must be text or a whole number'),
        (b'{"prompt": "a", "id": true}', '"id" must be'),
        (b'{"prompt": "a", "id": "' + b"x" * 1001 + b'"}', '"id" is longer than 1,000'),
        (b'{"prompt": "' + b"a" * (4 << 20) + b'"}', "longer than 4,194,304 bytes"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_line_that_is_not_as_it_must_be_is_told_with_its_number(tmp_path, line, says):
    with pytest.raises(RequestError) as error:
        read(tmp_path, b'{"prompt": "good"}\n\n' + line + b'\n{"prompt": "good"}\n')
    assert f"line 3 of {tmp_path / 'in'}" in str(error.value) and says in str(error.value)
    assert len(str(error.value)) < 400


def test_nothing_runs_and_nothing_is_written_when_a_line_is_bad(batch, refused, tmp_path):
    write(tmp_path / "in.jsonl", [*PROMPTS, {"prompt": "a", "top_k": "b"}])
    refused(*batch, names=[f"line {len(PROMPTS) + 1} of", "top_k"])
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_bad_arguments_are_refused_in_one_line(batch, refused, tiny, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    start = ["generate", tiny]
    refused(*start, "--batch", source, names=["--out"])
    refused(*start, "--batch", source, "--out", source, names=["is the file of prompts"])
    refused(*start, "--batch", tmp_path / "no", "--out", out, names=["no", "cannot be read"])
    refused(*start, "--batch", tmp_path, "--out", out, names=["cannot be read", "directory"])
    refused(*start, "--batch", source, "--out", tmp_path, names=["not a file"])
    refused(*start, "--batch", source, "--out", tmp_path / "no/out", names=["cannot be written"])
    refused(*batch, "--batch-size", 3, names=["1, 2, 4", "3"])
    refused(*batch, "--temperature", -1, names=["temperature"])
    for option in (["--prompt", "a"], ["--prompt-cache", out], ["--lookup"]):
        refused(*batch, *option, names=[option[0], "--batch"])
    for option in (["--out", out], ["--overwrite"], ["--batch-size", 2]):
        refused(*start, "--prompt", "a", *option, names=[option[0], "--batch"])
    (tmp_path / "empty").write_bytes(b"\n")
    refused(*start, "--batch", tmp_path / "empty", "--out", out, names=["no prompts"])
    assert not out.exists()


@pytest.mark.sample
def test_the_real_model_goes_on_from_several_prompts(sample_bundle, tmp_path):
    prompts = ["1, 2, 3, 4, 5, 6,", "a b c d e f g h i j"]
    source = write(tmp_path / "in", [{"prompt": prompt} for prompt in prompts])
    options = ("--batch", source, "--out", tmp_path / "out", "--max-tokens", 16)
    edge_demo("generate", sample_bundle, *options)
    texts = [record["text"] for record in lines(tmp_path / "out")]
    assert texts == [" 7, 8, 9, 10, 11", " k l m n o p q r s t u v w x y z"]
