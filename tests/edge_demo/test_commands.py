"""The commands: what they print for people and programs, and how they refuse."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest

from edge_demo.evaluate.perplexity import score
from edge_demo.text.ranges import RANGES, range_text
from tests.conftest import ROOT
from tests.edge_demo.bundle_files import copy_bundle, edit_manifest, flip_byte, rewrite
from tests.edge_demo.conftest import generator

# `doctor` needs no bundle: test_doctor.py; what `bench` shows: test_bench.py
COMMANDS = ("generate", "chat", "bench", "score", "compare", "inspect")
REPORT = {
    "prompt_ids", "ids", "text", "finish_reason", "reused_tokens", "prompt_cache", "timings",
    "peak_rss_bytes",
}  # fmt: skip
TIMINGS = {"load_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
EDGE_DEMO = [sys.executable, "-W", "error", "-m", "edge_demo.cli.main"]


def edge_demo(*arguments, stdin=b"", status=0, **options):
    """Run a command in a process of its own; its stdout and stderr as text."""
    result = subprocess.run(
        [*EDGE_DEMO, *map(str, arguments)],
        cwd=ROOT,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=120,
        **options,
    )
    out, err = result.stdout.decode(), result.stderr.decode()
    assert result.returncode == status, err
    assert "Traceback" not in err
    return out, err


def shell(script, *arguments):
    """Run a script whose `"$@"` is the command; exit status, stdout and stderr."""
    command = ["bash", "-c", script, "bash", *EDGE_DEMO, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def tiny(tiny_bundles):
    return tiny_bundles / "gemma3-int8"


# --- generate ------------------------------------------------------------------------------------


def test_generate_reports_to_programs_what_python_finds(tiny, run_json):
    report = run_json("generate", tiny, "--prompt", "The boat", "--max-tokens", 9)
    assert set(report) == REPORT and set(report["timings"]) == TIMINGS
    used = generator(tiny)
    expected = used.generate(used.tokenizer.encode("The boat"), _greedy(), 9)
    assert report["prompt_ids"] == expected.prompt_ids
    assert report["ids"] == expected.ids and report["text"] == expected.text
    assert report["finish_reason"] == "length"
    assert all(value > 0 for value in report["timings"].values())
    assert 20e6 < report["peak_rss_bytes"] < 64e9


def _greedy():
    from edge_demo.text.sampling import Sampler

    return Sampler()


def test_generate_prints_prompt_and_answer_and_its_speed_beside_them(tiny, run, run_json):
    arguments = ("generate", tiny, "--prompt", "The boat", "--max-tokens", 9)
    text = run_json(*arguments)["text"]
    status, out, err = run(*arguments)
    assert status == 0
    assert out == f"The boat{text}\n"
    assert re.fullmatch(
        r"load [\d.]+ s · first token [\d.]+ s · \d+ tokens/s · [\d.]+ [MG]B\n", err
    )


def test_one_token_has_no_decode_speed(tiny, run_json, run):
    arguments = ("generate", tiny, "--prompt", "The boat", "--max-tokens", 1)
    assert run_json(*arguments)["timings"]["decode_tokens_per_s"] is None
    assert "1 tokens" in run(*arguments)[2]


def test_a_seed_repeats_and_another_differs(tiny, run_json):
    texts = [
        run_json(
            "generate", tiny, "--prompt", "The", "--max-tokens", 20, "--temperature", 1,
            "--top-k", 50, "--top-p", 0.95, "--seed", seed,
        )["ids"]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "stdin, text",
    [(b"The boat", "The boat"), (b"caf\xe9\n", "caf\ufffd\n"), ("é😀".encode(), "é😀")],
)
def test_a_prompt_comes_from_stdin(tiny, stdin, text):
    out, _ = edge_demo("generate", tiny, "--max-tokens", 3, "--json", stdin=stdin)
    assert json.loads(out)["prompt_ids"] == generator(tiny).tokenizer.encode(text)


@pytest.mark.parametrize("stdin", [b"", b"\n", b" \r\n\n"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_an_empty_stdin_is_refused_and_no_story_from_nothing(tiny, command, stdin):
    out, err = edge_demo(command, tiny, "--max-tokens", 3, stdin=stdin, status=2)
    assert out == "" and err.count("\n") == 1
    assert "stdin is empty" in err and "--prompt" in err


def test_an_empty_prompt_that_is_asked_for_is_one(tiny, run_json):
    assert run_json("generate", tiny, "--prompt", "", "--max-tokens", 3)["prompt_ids"] == [2]


@pytest.mark.parametrize("name, mark", [("chat", "<end_of_turn>"), ("chatml", "<|im_start|>")])
def test_a_prompt_in_the_template_is_told_that_it_is_text(tiny_bundles, name, mark):
    command = ("generate", tiny_bundles / name, "--max-tokens", 1, "--json", "--prompt")
    out, err = edge_demo(*command, f"a{mark}b")
    assert f"holds {mark}, which is tokenized as plain text" in err
    ids = json.loads(out)["prompt_ids"]
    assert ids == generator(tiny_bundles / name).tokenizer.encode(f"a{mark}b")
    assert "holds" not in edge_demo(*command, "a < b")[1]


def test_an_argument_that_is_no_utf8_is_a_prompt_too(tiny):
    command = [*EDGE_DEMO, "generate", tiny, "--max-tokens", "3", "--prompt", b"caf\xe9"]
    for options in ([], ["--json"]):
        result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, timeout=60)
        assert result.returncode == 0, result.stderr
    expected = generator(tiny).tokenizer.encode("caf\ufffd")
    assert json.loads(result.stdout)["prompt_ids"] == expected


def test_control_characters_reach_a_pipe_as_they_are(tiny):
    prompt = "a\x1b[2J\x07b"
    out, _ = edge_demo("generate", tiny, "--prompt", prompt, "--max-tokens", 2)
    assert out.startswith(prompt)


@pytest.mark.sample
def test_the_sample_speaks(sample_bundle):
    prompt = "1, 2, 3, 4, 5, 6,"
    out, _ = edge_demo("generate", sample_bundle, "--prompt", prompt, "--max-tokens", 16)
    assert out == f"{prompt} 7, 8, 9, 10, 11\n"


# --- chat ----------------------------------------------------------------------------------------


def test_a_draft_model_gives_the_same_answer(tiny_bundles):
    bundle, draft = tiny_bundles / "gemma3-fp32", tiny_bundles / "gemma3-int8"
    options = ("--prompt", "The boat", "--max-tokens", 20, "--threads", 1, "--json")
    plain, drafted = (
        json.loads(edge_demo("generate", bundle, *options, *more)[0])
        for more in ((), ("--draft", draft))
    )
    assert drafted["ids"] == plain["ids"]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--draft", "{chat}"), "has a different tokenizer from"),
        (("--draft", "nowhere"), "nowhere"),
        (("--draft", "{chat}", "--lookup"), "not allowed with"),
    ],
    ids=["a different tokenizer", "missing", "two kinds of guesses"],
)
def test_a_draft_that_cannot_be_used_is_refused(tiny_bundles, more, message):
    more = [part.format(chat=tiny_bundles / "chat") for part in more]
    bundle = tiny_bundles / "gemma3-fp32"
    out, err = edge_demo("generate", bundle, "--prompt", "A", *more, status=2)
    assert (out, err.count("\n")) == ("", 1) and message in err


def reports(out):
    return [json.loads(line) for line in out.splitlines()]


def test_chat_with_a_tuned_model_keeps_the_turns(tiny_bundles):
    bundle = tiny_bundles / "chat"
    out, err = edge_demo(
        "chat", bundle, "--json", "--max-tokens", 6, "--seed", 5, stdin="Hi!\0\n  \n\0Boat?"
    )
    first, second = reports(out)
    assert "instruction-tuned" in err and "continues" not in err
    encode = generator(bundle).tokenizer.encode_chat
    assert first["prompt_ids"] == encode([("user", "Hi!")])
    assert second["prompt_ids"] == encode(
        [("user", "Hi!"), ("model", first["text"]), ("user", "Boat?")]
    )
    assert set(first) == set(second) == REPORT
    assert first["prompt_cache"] is None and second["reused_tokens"] > 0
    assert first["timings"]["load_s"] == second["timings"]["load_s"] > 0


def test_chat_with_a_base_model_continues_the_text_and_says_so(tiny):
    out, err = edge_demo(
        "chat", tiny, "--json", "--max-tokens", 4, "--seed", 5, stdin="The boat\n\0was\n"
    )
    first, second = reports(out)
    assert "a base model: it continues" in err and "instruction-tuned" not in err
    encode = generator(tiny).tokenizer.encode
    assert first["prompt_ids"] == encode("The boat")
    assert second["prompt_ids"] == encode(f"The boat{first['text']}was")


def test_chat_prints_an_answer_a_turn_to_people(tiny_bundles):
    options = ("--max-tokens", 6, "--seed", 5)
    bundle = tiny_bundles / "chat"
    answers = [
        r["text"]
        for r in reports(edge_demo("chat", bundle, "--json", *options, stdin="Hi\0Boat\n")[0])
    ]
    out, err = edge_demo("chat", bundle, *options, stdin="Hi\0Boat\n")
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert err.count("6 tokens") == 2 and "[length]" in err


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_piped_message_of_several_lines_is_one_message(tiny_bundles, end):
    message = "Hi!\n\nBoat?\n/bye\nexit\n  the"
    out, _ = edge_demo(
        "chat", tiny_bundles / "chat", "--json", "--max-tokens", 2, stdin=message + end
    )
    (only,) = reports(out)
    encode = generator(tiny_bundles / "chat").tokenizer.encode_chat
    assert only["prompt_ids"] == encode([("user", message)])
    out, _ = edge_demo(
        "chat", tiny_bundles / "gemma3-int8", "--json", "--max-tokens", 2, stdin=message + end
    )
    (only,) = reports(out)
    assert only["prompt_ids"] == generator(tiny_bundles / "gemma3-int8").tokenizer.encode(message)


def test_a_message_on_the_command_line_is_answered_and_stdin_is_left_alone(tiny_bundles):
    bundle = tiny_bundles / "chat"
    read, write = os.pipe()  # nobody writes, nobody closes it
    result = subprocess.run(
        [*EDGE_DEMO, "chat", bundle, "--prompt", "Hi!\nBoat?", "--max-tokens", "2", "--json"],
        cwd=ROOT, stdin=read, capture_output=True, timeout=60,
    )  # fmt: skip
    os.close(read)
    os.close(write)
    assert result.returncode == 0, result.stderr
    (only,) = reports(result.stdout.decode())
    encode = generator(bundle).tokenizer.encode_chat
    assert only["prompt_ids"] == encode([("user", "Hi!\nBoat?")])


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_message_is_refused(refused, tiny, prompt):
    refused("chat", tiny, "--prompt", prompt, names=["--prompt is empty"])


def test_a_message_longer_than_the_context_is_refused_with_both_counts(tiny_bundles):
    out, err = edge_demo("chat", tiny_bundles / "short", stdin="gardener " * 30, status=2)
    assert out == "" and "tokens" in err and "context holds 16" in err


def test_a_conversation_that_fills_the_context_goes_on_without_its_oldest_turns(tiny_bundles):
    bundle = tiny_bundles / "chat"
    words = [f"The boat number {n} went down the river" for n in range(8)]
    options = ("--max-tokens", 8, "--seed", 1, "--system", "Be kind")
    out, err = edge_demo("chat", bundle, "--json", *options, stdin="\0".join(words))
    found = reports(out)
    assert len(found) == len(words)
    tokenizer, turns, dropped = generator(bundle).tokenizer, [], 0
    for word, report in zip(words, found, strict=True):
        turns.append(("user", word))
        while report["prompt_ids"] != tokenizer.encode_chat(turns, "Be kind"):
            dropped += 1
            del turns[:2]
        assert len(report["prompt_ids"]) + 8 <= 128
        turns.append(("model", report["text"]))
    assert dropped > 2 and "the oldest" in err and "context of 128 tokens" in err


def test_chat_reads_what_is_no_utf8(tiny):
    out, _ = edge_demo("chat", tiny, "--json", "--max-tokens", 2, stdin=b"caf\xe9\n")
    assert reports(out)[0]["prompt_ids"] == generator(tiny).tokenizer.encode("caf\ufffd")


# --- score and inspect --------------------------------------------------------------------


def test_score_reports_what_python_finds(tiny, tmp_path, run, run_json):
    text = "The gardener waters the young trees – before the sun is high.\n" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    used = generator(tiny)
    ids = used.tokenizer.encode(text, bos=False)
    for options, arguments in (
        (("--length", 32), (32, 16)),
        (("--length", 33), (33, 16)),
        (("--length", 32, "--stride", 31, "--windows", 2), (32, 31, 2)),
        (("--length", 2), (2, 1)),
    ):
        found = run_json("score", tiny, "--text", tmp_path / "text.txt", *options)
        assert set(found) == {"perplexity", "nll", "tokens", "windows"}
        expected = score(used.engine, 2, ids, *arguments)
        assert (found["tokens"], found["windows"]) == (expected.tokens, expected.windows)
        # another number of threads rounds otherwise
        assert found["nll"] == pytest.approx(expected.nll, abs=0.02)
        assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    status, out, err = run("score", tiny, "--text", tmp_path / "text.txt", "--length", 32)
    assert (status, err) == (0, "") and f"{len(ids)} tokens" in out and "perplexity" in out


@pytest.mark.sample
def test_score_of_the_sample_on_english_is_that_of_a_language_model(sample_bundle):
    options = ("--text", ROOT / "LICENSE", "--length", 128, "--windows", 2, "--json")
    found = json.loads(edge_demo("score", sample_bundle, *options)[0])
    assert found["tokens"] == 127 + 64
    assert 1 < found["perplexity"] < 20


def test_inspect_shows_what_the_manifest_says(tiny, tiny_bundles, run, run_json):
    assert run_json("inspect", tiny) == json.loads((tiny / "bundle.json").read_bytes())
    status, out, err = run("inspect", tiny)
    assert (status, err) == (0, "")
    for word in ("tiny-gemma3", "base", "int8", "128 tokens", "model.onnx_data", "sizes checked"):
        assert word in out
    assert "SHA-256 checked" in run("inspect", tiny, "--verify")[1]
    assert "instruction-tuned" in run("inspect", tiny_bundles / "chat")[1]


@pytest.mark.sample
def test_inspect_of_the_sample_shows_its_licence(sample_bundle):
    out, _ = edge_demo("inspect", sample_bundle, "--verify")
    assert "gemma" in out and "GEMMA_NOTICE.txt" in out and "SHA-256 checked" in out


# --- help and bad options ------------------------------------------------------------------------

OPTIONS = {
    "generate": "--prompt --threads --max-tokens --temperature --top-k --top-p --seed --json "
    "--prompt-cache --prompt-cache-ro --lookup --draft --force --batch --out --overwrite "
    "--batch-size --stop --min-p --repeat-penalty --presence-penalty --frequency-penalty "
    "--repeat-last-n",
    "chat": "--prompt --system --threads --max-tokens --temperature --top-k --top-p --seed --json "
    "--prompt-cache --prompt-cache-ro --lookup --draft --force --stop --min-p --repeat-penalty "
    "--presence-penalty --frequency-penalty --repeat-last-n --no-history",
    "bench": "-p --prompt-tokens -n --decode-tokens -d --depth -r --repeats -t --threads -o "
    "--output --force --json",
    "score": "--text --length --stride --windows --hellaswag --tasks --threads --json",
    "compare": "REFERENCE --text --length --windows --threads --json",
    "inspect": "--verify --json",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(run, command):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert "BUNDLE" in out and all(option in out for option in OPTIONS[command].split())
    assert f"    {command}" in run("--help")[1]


def test_the_version_is_that_of_the_distribution(run):
    status, out, err = run("--version")
    version, runtime = (importlib.metadata.version(n) for n in ("gemma-keras", "onnxruntime"))
    assert (status, err) == (0, "")
    assert out == (
        f"edge-demo {version} (onnxruntime {runtime}, Python {platform.python_version()})\n"
    )


def test_the_package_is_the_command():
    command = [sys.executable, "-W", "error", "-m", "edge_demo", "inspect", "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "edge-demo: the bundle nowhere does not exist\n"


def test_help_does_not_load_what_runs_models():
    code = "import sys, edge_demo.cli.main as c\ntry: c.main(['chat', '--help'])\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert "'argparse'" in out and "numpy" not in out and "onnxruntime" not in out


def test_help_names_the_range_of_each_setting():
    page = " ".join(edge_demo("generate", "--help")[0].split())
    for name in RANGES:
        option = page.rpartition(f"--{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert f"({range_text(name)}; default: " in option


@pytest.mark.parametrize("unknown", ["extra", "--nope"])
def test_what_a_command_does_not_know_names_the_help_of_that_command(refused, unknown):
    names = [f"unrecognized arguments: {unknown};", "see edge-demo generate --help"]
    refused("generate", "nowhere", unknown, names=names)


@pytest.mark.parametrize(
    "options, names",
    [
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "hot"], ["--temperature", "hot"]),
        (["--top-p", "0"], ["top-p", "0"]),
        (["--top-p", "1.5"], ["top-p", "1.5"]),
        (["--top-k", "-1"], ["top-k", "-1"]),
        (["--max-tokens", "0"], ["--max-tokens", "'0' is not a positive whole number"]),
        (["--max-tokens", "-5"], ["--max-tokens", "-5"]),
        (["--max-tokens", "many"], ["--max-tokens", "'many' is not a positive whole number"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--min-p", "1.1"], ["min-p", "1.1"]),
        (["--min-p", "nan"], ["min-p", "nan"]),
        (["--repeat-penalty", "0"], ["repeat-penalty", "0"]),
        (["--repeat-penalty", "inf"], ["repeat-penalty", "inf"]),
        (["--presence-penalty", "-2.5"], ["presence-penalty", "-2.5"]),
        (["--frequency-penalty", "nan"], ["frequency-penalty", "nan"]),
        (["--repeat-last-n", "-2"], ["repeat-last-n", "-2"]),
        (["--stop", ""], ["stop", "empty"]),
        (["--stop", "a", "--stop", "\udce9"], ["stop", "UTF-8"]),
        (["--stop", "a" * 1001], ["stop", "1,001"]),
        (["--stop", "a"] * 65, ["64", "65"]),
        (["--seed", "x"], ["--seed", "x"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--threads", "1025"], ["threads", "1,025"]),
        (["--threads", str(10**15)], ["threads"]),
        (["--no-such"], ["--no-such"]),
        (["another"], ["another"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_an_option_out_of_range_is_refused_in_one_line(tiny, refused, command, options, names):
    refused(command, tiny, "--prompt", "The", *options, names=names)


@pytest.mark.parametrize(
    "arguments, names",
    [
        ([], ["COMMAND"]),
        (["sing"], ["sing", "generate"]),
        (["generate"], ["BUNDLE"]),
        (["score", "."], ["--text"]),
    ],
)
def test_an_incomplete_command_is_refused_in_one_line(refused, arguments, names):
    refused(*arguments, names=[*names, "--help"])


# --- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def command(tiny, tmp_path):
    """Any command's arguments for a bundle."""
    (tmp_path / "text.txt").write_text("The gardener waters the young trees.")
    options = {
        "generate": ["--prompt", "The", "--max-tokens", 2],
        "chat": ["--prompt", "The", "--max-tokens", 2],
        "bench": ["--prompt-tokens", 4, "--decode-tokens", 2],
        "score": ["--text", tmp_path / "text.txt", "--length", 16],
        "compare": [tiny, "--text", tmp_path / "text.txt", "--length", 16],
        "inspect": ["--verify"],
    }
    return lambda name, bundle: [name, bundle, *options[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_bundle_that_is_none(refused, command, tmp_path, name):
    refused(*command(name, tmp_path / "nowhere"), names=[tmp_path / "nowhere", "does not exist"])
    refused(*command(name, tmp_path), names=[tmp_path, "not a bundle"])
    (tmp_path / "bundle.json").write_text("{")
    refused(*command(name, tmp_path), names=["bundle.json", "not JSON"])


@pytest.mark.parametrize("file", ["engine.onnx", "tokenizer.model", "model.onnx_data"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_bundle_with_a_changed_or_missing_file(
    refused, command, tiny, tmp_path, name, file
):
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    flip_byte(bundle / file)
    refused(*command(name, bundle), names=[file, "has changed"])
    (bundle / file).unlink()
    refused(*command(name, bundle), names=[file, "lacks"])


def test_a_bundle_whose_parts_do_not_fit_is_refused(refused, command, tiny, tiny_bundles, tmp_path):
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    other = tiny_bundles / "gemma2-int8" / "candidates.onnx"
    rewrite(bundle, "candidates.onnx", other.read_bytes())
    refused(*command("generate", bundle), names=["candidates.onnx"])
    rewrite(bundle, "candidates.onnx", b"no graph")
    refused(*command("generate", bundle), names=["candidates.onnx", "onnxruntime"])
    bundle = copy_bundle(tiny, tmp_path / "other")
    rewrite(bundle, "tokenizer.model", b"no model")
    refused(*command("generate", bundle), names=["tokenizer.model", "SentencePiece"])
    edit_manifest(bundle, lambda m: m.pop("plan") and None)
    refused("inspect", bundle, names=["bundle.json", "plan"])


def test_a_large_file_that_changes_between_two_runs_is_noticed(tiny, tmp_path):
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    rewrite(bundle, "large.bin", bytes(9 << 20))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = ("generate", bundle, "--prompt", "The", "--max-tokens", 2)
    edge_demo(*arguments, env=environment)
    remembered = (tmp_path / "cache/gemma-keras/verified.json").read_text()
    assert "large.bin" in remembered and "engine.onnx" not in remembered
    edge_demo(*arguments, env=environment)
    times = (bundle / "large.bin").stat()
    flip_byte(bundle / "large.bin")
    os.utime(bundle / "large.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    _, err = edge_demo(*arguments, env=environment, status=2)
    assert err.count("\n") == 1 and "large.bin" in err


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_a_home_that_cannot_be_written_breaks_nothing(tiny, tmp_path, home):
    bundle = copy_bundle(tiny, tmp_path / "bundle")
    rewrite(bundle, "large.bin", bytes(9 << 20))
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    out, _ = edge_demo(
        "generate", bundle, "--prompt", "The", "--max-tokens", 2, env=environment | {"HOME": home}
    )
    assert out.startswith("The")


def test_a_prompt_longer_than_the_context_is_refused_with_both_counts(run, tiny_bundles):
    words = "The gardener waters the young trees."
    status, _, err = run("generate", tiny_bundles / "short", "--prompt", words)
    tokens = len(generator(tiny_bundles / "short").tokenizer.encode(words))
    assert tokens > 16 and status == 2 and err.count("\n") == 1
    assert f"{tokens} tokens" in err and "holds 16" in err


def test_bench_and_score_that_do_not_fit_the_context_are_refused(refused, command, tiny_bundles):
    short = tiny_bundles / "short"
    refused("bench", short, "--prompt-tokens", 17, names=["17 tokens", "of 16"])
    refused("bench", short, "-p", 0, "-n", 1, "-d", 16, names=["16 + 1", "of 16"])
    refused(*command("score", short)[:-1], 17, names=["17", "16"])
    refused(*command("score", short), "--stride", 16, names=["stride must be 1 to 15", "16"])
    refused(*command("score", short)[:-1], 1, names=["at least 2"])


@pytest.mark.parametrize(
    "content, names",
    [(None, ["not a file"]), (b"caf\xe9", ["not UTF-8"]), (b"", ["empty"])],
    ids=["missing", "latin-1", "empty"],
)
def test_a_text_that_cannot_be_scored_is_refused(refused, tiny, tmp_path, content, names):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
        names = [*names] if content == b"" else [*names, path]
    else:
        names = [*names, path]
    refused("score", tiny, "--text", path, names=names)


def test_a_folder_as_text_is_refused(refused, tiny, tmp_path):
    refused("score", tiny, "--text", tmp_path, names=["not a file", tmp_path])


# --- pipes and closed streams --------------------------------------------------------------------


@pytest.mark.sample
def test_a_reader_that_leaves_ends_the_answer_without_a_word(sample_bundle):
    status, out, err = shell(
        '"$@" | head -c 5; exit ${PIPESTATUS[0]}',
        *("generate", sample_bundle, "--prompt", "Once upon a time", "--max-tokens", 2000),
    )
    assert (status, out, err) == (1, "Once ", "")


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_reader_that_was_never_there_is_no_traceback(tiny, options):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [*EDGE_DEMO, "generate", tiny, "--prompt", "The", "--max-tokens", "3", *options],
        cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_full_disk_is_told_in_one_line(tiny, command):
    options = ("--prompt", "The") if command == "generate" else ()
    status, _, err = shell('"$@" > /dev/full', command, tiny, *options)
    assert status == 1 and err.count("\n") == 1 and "No space left" in err


def test_closed_streams_are_no_traceback(tiny):
    arguments = ("generate", tiny, "--max-tokens", 3)
    for command in (arguments, ("chat", *arguments[1:])):
        status, out, err = shell('"$@" <&-', *command)
        assert (status, out) == (2, "") and "stdin is empty" in err and err.count("\n") == 1
    status, out, err = shell('"$@" >&-', *arguments, "--prompt", "The")
    assert (status, out) == (0, "") and err.count("\n") == 1
    status, out, err = shell('"$@" 2>&-', *arguments, "--prompt", "The")
    assert status == 0 and out.startswith("The") and "tokens/s" not in out
    assert shell('"$@" <&- >&- 2>&-', *arguments, "--prompt", "The")[0] == 0
    assert shell('"$@" <&- >&- 2>&-', *arguments)[0] == 2


def test_text_is_utf8_whatever_the_locale(tiny):
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ("--max-tokens", 2, "--json")
    prompt = generator(tiny).tokenizer.encode("é😀")
    for command in ("generate", "chat"):
        out, _ = edge_demo(command, tiny, *arguments, stdin="é😀", env=environment)
        assert json.loads(out)["prompt_ids"] == prompt
    out, _ = edge_demo("generate", tiny, "--max-tokens", 2, stdin="é😀", env=environment)
    assert out.startswith("é😀")


@pytest.mark.sample
def test_the_least_margins_of_the_pinned_texts_are_no_noise(sample_generator):
    """Guards `test_the_sample_speaks`."""
    engine = sample_generator.engine
    ids = sample_generator.tokenizer.encode("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")
    engine.rewind(0)
    rows = np.concatenate(list(engine.all_logits(ids)))[-17:-1]
    second, best = np.sort(rows)[:, -2:].T
    assert (best - second).min() > 2
