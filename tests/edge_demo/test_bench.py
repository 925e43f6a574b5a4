"""`edge-demo bench`: what is run, and how it is shown. No test asks how fast anything is."""

from __future__ import annotations

import csv
import dataclasses
import getpass
import json
import os
import platform
import re
import statistics
import weakref

import pytest

from edge_demo.bundle.graph_weights import bytes_per_token
from edge_demo.bundle.reader import Bundle
from edge_demo.cli.bench import as_json, as_markdown, to_share
from edge_demo.device import hardware
from edge_demo.durable import write_whole
from edge_demo.errors import RequestError
from edge_demo.evaluate import speed as bench_module
from edge_demo.evaluate.speed import BenchCase, BenchReport, Timing, run_tests
from tests.edge_demo.test_commands import edge_demo

BenchCase.__test__ = False  # no test case of pytest

KEYS = {
    "model", "recipe", "weights_bytes", "load_s", "ttft_s", "prefill_tokens_per_s",
    "decode_tokens_per_s", "prompt_tokens", "decode_tokens", "repeats", "peak_rss_bytes", "celsius",
    "throttled", "tests",
}  # fmt: skip


@pytest.fixture
def tiny(tiny_bundles):
    return tiny_bundles / "gemma3-int8"


def test_programs_get_the_long_names_they_know(tiny, run_json):
    found = run_json(
        "bench", tiny, "--prompt-tokens", 123, "--decode-tokens", 5, "--repeats", 2, "--threads", 1
    )
    assert set(found) == KEYS
    assert (found["prompt_tokens"], found["decode_tokens"], found["repeats"]) == (123, 5, 2)
    assert found["weights_bytes"] == (tiny / "model.onnx_data").stat().st_size
    assert found["load_s"] > 0 and 20e6 < found["peak_rss_bytes"] < 64e9
    prompt, decode = found["tests"]
    assert (prompt["test"], decode["test"]) == ("pp123", "tg5")
    for test in found["tests"]:
        assert len(test["seconds"]) == 2 and test["threads"] == 1
        speeds = [test["tokens"] / s for s in test["seconds"]]
        assert test["tokens_per_s"]["mean"] == pytest.approx(statistics.fmean(speeds))
        assert test["tokens_per_s"]["deviation"] == pytest.approx(statistics.stdev(speeds))
    assert found["prefill_tokens_per_s"] == prompt["tokens_per_s"]["mean"]
    assert found["decode_tokens_per_s"] == decode["tokens_per_s"]["mean"]
    assert found["ttft_s"] == pytest.approx(statistics.fmean(prompt["seconds"]))


def test_people_get_a_table_like_that_of_llama_bench(tiny, run):
    status, out, err = run("bench", tiny, "-p", "8,16", "-n", 4, "-d", "0,32", "-r", 2, "-t", "1,2")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:14]]
    assert cells[0] == ["model", "size", "threads", "test", "t/s"]
    assert re.fullmatch(r"(\|-+:?)+\|", lines[1])
    assert len({len(line) for line in lines[:14]}) == 1
    tests = ["pp8", "pp16", "tg4", "pp8 @ d32", "pp16 @ d32", "tg4 @ d32"]
    assert [(c[2], c[3]) for c in cells[2:]] == [(t, test) for t in "12" for test in tests]
    for model, size, _, _, speed in cells[2:]:
        assert model == "tiny-gemma3 int8" and size.endswith(" MB")
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", speed)
    assert lines[14] == "" and "load" in lines[15] and "after 8 tokens" in lines[15]
    assert "peak memory" in lines[15]


def test_one_engine_is_held_at_a_time(tiny, monkeypatch):
    held = []

    def engine_for(*arguments, **options):
        assert not any(engine() for engine in held)
        engine = make(*arguments, **options)
        held.append(weakref.ref(engine))
        return engine

    make = bench_module.engine_for
    monkeypatch.setattr(bench_module, "engine_for", engine_for)
    tests = [BenchCase("pp", 4, 0), BenchCase("tg", 2, 0)]
    run_tests(Bundle.open(tiny), tests, threads=[1, 2], repeats=1)
    assert len(held) == 2


def test_csv_and_json_say_the_same_in_their_ways(tiny, run):
    options = ("bench", tiny, "-p", 0, "-n", 3, "-d", 7, "-r", 1)
    (row,) = csv.DictReader(run(*options, "-o", "csv")[1].splitlines())
    assert (row["model"], row["test"], row["depth"]) == ("tiny-gemma3 int8", "tg3 @ d7", "7")
    assert int(row["bytes"]) == (tiny / "model.onnx_data").stat().st_size
    assert float(row["mean"]) > 0 and float(row["deviation"]) == 0
    found = json.loads(run(*options, "-o", "json")[1])
    assert set(found) == KEYS
    assert found["ttft_s"] is found["prefill_tokens_per_s"] is found["prompt_tokens"] is None
    assert [t["test"] for t in found["tests"]] == ["tg3 @ d7"]


def test_mean_and_deviation_are_of_speeds(tiny):
    timing = Timing(BenchCase("tg", 100, 4096), 2, (2.0, 4.0))
    assert timing.mean == pytest.approx(37.5)
    assert timing.deviation == pytest.approx(statistics.stdev([50, 25]))
    report = BenchReport((timing,), 1.0, 10**9, 61.5, "not throttled")
    table = as_markdown(Bundle.open(tiny), report)
    assert "| tg100 @ d4096 | 37.50 ± 17.68 |" in table
    assert as_json(Bundle.open(tiny), report, 2)["celsius"] == 61.5


@pytest.mark.parametrize("generation", ["gemma", "gemma2", "gemma3"])
def test_what_is_timed_begins_at_its_depth(tiny_bundles, generation, monkeypatch):
    """Sliding windows forget: what a rewind lost has to be there again before the clock starts."""
    bundle = Bundle.open(tiny_bundles / f"{generation}-int8")
    held = []

    class Runner(bench_module._Runner):
        def _hold(self, tokens):
            super()._hold(tokens)
            held.append(list(self._engine.tokens))

    monkeypatch.setattr(bench_module, "_Runner", Runner)
    tests = [
        BenchCase("pp", 20),
        BenchCase("tg", 9, 60),
        BenchCase("pp", 30, 60),
        BenchCase("tg", 5),
    ]
    report = run_tests(bundle, tests, (1,), 2)
    assert [len(tokens) for tokens in held] == [0, 0, 60, 60, 60, 60, 0, 0]
    assert held[2] == held[3] == held[4]
    assert [t.test for t in report.timings] == tests


def test_progress_counts_all_runs(tiny):
    told = []
    run_tests(
        Bundle.open(tiny),
        [BenchCase("pp", 4), BenchCase("tg", 2)],
        (1, 2),
        3,
        lambda *n: told.append(n),
    )
    assert told == [(i, 12) for i in range(1, 13)]


def test_the_whole_context_can_be_used_and_no_more(tiny_bundles):
    bundle = Bundle.open(tiny_bundles / "short")
    report = run_tests(
        bundle, [BenchCase("pp", 16), BenchCase("tg", 1, 15), BenchCase("pp", 6, 10)], (1,), 1
    )
    assert len(report.timings) == 3
    with pytest.raises(RequestError, match="12 \\+ 5 tokens do not fit the context of 16"):
        run_tests(bundle, [BenchCase("tg", 5, 12)])
    with pytest.raises(RequestError, match="17 tokens do not fit the context of 16"):
        run_tests(bundle, [BenchCase("pp", 17)])


@pytest.mark.parametrize(
    "options, names",
    [
        (["-p", "0", "-n", "0"], ["no test to run"]),
        (["-p", "-1"], ["-p", "-1"]),
        (["-p", "many"], ["--prompt-tokens", "'many'"]),
        (["-n", "1,,2"], ["--decode-tokens", "'1,,2'"]),
        (["-d", "0,x"], ["--depth", "'0,x'"]),
        (["-r", "0"], ["--repeats", "'0'"]),
        (["-r", "100000"], ["--repeats", "10,000"]),
        (["-t", "0"], ["threads", "0"]),
        (["-t", "1025"], ["threads", "1,025"]),
        (["-o", "xml"], ["--output", "xml"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_refused_in_one_line(tiny, refused, options, names):
    refused("bench", tiny, "-p", 4, "-n", 2, *options, names=names)


@pytest.mark.sample
def test_what_is_shared_says_nothing_about_its_owner(tiny, tmp_path, run, monkeypatch):
    device = hardware.look()
    named = dataclasses.replace(device, board="Raspberry Pi 5 Model B Rev 1.0")
    monkeypatch.setattr(hardware, "look", lambda: named)
    file = tmp_path / "mine.json"
    status, out, err = run("bench", tiny, "-p", 8, "-n", 2, "-r", 1, "--share", file)
    assert (status, err) == (0, "")
    found = json.loads(file.read_text())
    assert found["measured"].keys() == KEYS - {"model"}
    assert found["device"]["board"] == named.board and found["device"]["cores"] == device.cores
    assert found["assumed"]["bytes_per_s"] == 9.5e9
    assert found["bytes_per_token"] == bytes_per_token(tiny / "candidates.onnx")
    said = file.read_text()
    for private in (str(tiny), str(tmp_path), platform.node(), getpass.getuser()):
        assert len(private) < 4 or private not in said
    line = out.splitlines()[-1]
    assert line.startswith("Raspberry Pi 5: assumed 4 cores of 2.4 GHz") and "9.5 GB/s" in line
    most = 9.5e9 / found["bytes_per_token"]
    assert line.endswith(f"at most {most:.0f} tokens/s by memory")


def test_a_board_with_a_name_of_its_own_is_not_shared(tiny):
    named = dataclasses.replace(hardware.look(), board="Anna's board")
    report = run_tests(Bundle.open(tiny), [BenchCase("tg", 1)], [1], 1)
    found = to_share(Bundle.open(tiny), report, 1, named)
    assert found["device"]["board"] is None and found["assumed"] is None


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("no/such/folder/file", "folder does not exist"),
        (".", "already exists"),
        ("pipe", "already exists"),
        ("mine.txt", "already exists; choose another file for --share"),
        ("link", "already exists"),
        ("x" * 300, "too long for the name of a file"),
    ],
)
def test_a_file_that_cannot_be_shared_is_one_line(tiny, tmp_path, refused, place, said):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    options = ("-p", 0, "-n", 1, "-r", 1, "--share", tmp_path / place)
    refused("bench", tiny, *options, names=[said])
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_whole(tmp_path / "pipe", [b"x"])
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_bench_of_the_sample_knows_how_large_it_is(sample_bundle):
    options = ("-p", 16, "-n", 2, "-d", "0,600", "-r", 1, "--json")
    found = json.loads(edge_demo("bench", sample_bundle, *options)[0])
    assert 300e6 < found["peak_rss_bytes"] < 4e9
    assert [t["test"] for t in found["tests"]] == ["pp16", "tg2", "pp16 @ d600", "tg2 @ d600"]
