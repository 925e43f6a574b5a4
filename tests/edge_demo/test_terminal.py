"""The commands on a terminal of their own: interruptions, line editing, control characters."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from edge_demo.cli.terminal import Progress
from tests.conftest import ROOT
from tests.edge_demo.bundle_files import copy_bundle, edit_manifest
from tests.edge_demo.conftest import generator
from tests.edge_demo.pseudo_terminal import (
    CTRL_C,
    CTRL_D,
    EDITORS,
    PROMPT,
    XTERM,
    Terminal,
    environment_with,
)

# --- Ctrl-C and Ctrl-D ---------------------------------------------------------------------------


@pytest.mark.sample
def test_ctrl_c_ends_an_answer_with_what_there_is(sample_bundle):
    options = ("--prompt", "Once upon a time", "--max-tokens", 5000)
    with Terminal("generate", sample_bundle, *options) as terminal:
        terminal.wait_for(r"Once upon a time.{20}")
        terminal.keys(CTRL_C)
        assert terminal.finish() == 130
        assert "tokens/s" in terminal.screen


@pytest.mark.sample
def test_ctrl_c_ends_an_answer_for_programs_with_a_report(sample_bundle):
    options = ("--prompt", "Once upon a time", "--max-tokens", 5000, "--json")
    for seconds in (2, 4, 8, 16):  # nothing shows when the model is loaded
        with Terminal("generate", sample_bundle, *options, stdout=subprocess.PIPE) as terminal:
            time.sleep(seconds)
            terminal.keys(CTRL_C)
            out = terminal.process.stdout.read()
            status = terminal.finish()
        if out:
            break
        assert status in (130, -signal.SIGINT)  # on a busy machine Python itself may be starting
    assert status == 130
    assert json.loads(out)["finish_reason"] == "interrupted"


@pytest.mark.sample
def test_ctrl_c_in_a_chat_ends_the_answer_and_ctrl_d_the_chat(sample_bundle):
    with Terminal("chat", sample_bundle, "--max-tokens", 5000, "--temperature", 0) as terminal:
        assert "base model" in terminal.wait_for(PROMPT)
        for _ in range(2):
            terminal.keys(b"Once upon a time\n")
            terminal.wait_for(r"Once upon a time\s+\S.{20}")
            terminal.keys(CTRL_C)
            assert "[interrupted]" in terminal.wait_for(PROMPT)
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0


def test_ctrl_c_while_a_message_is_written_throws_it_away(tiny_bundles):
    with Terminal("chat", tiny_bundles / "chat", "--max-tokens", 3) as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(b"never mind")
        terminal.wait_for("never mind")
        terminal.keys(CTRL_C)
        try:
            terminal.wait_for(PROMPT, seconds=10)
        except AssertionError:
            # A signal that comes just before readline waits for a key is heard at the next key.
            terminal.keys(CTRL_C)
            terminal.wait_for(PROMPT)
        terminal.keys(b"\n")
        terminal.wait_for(PROMPT)
        assert "tokens" not in terminal.screen
        terminal.keys(b"Hi\n")
        terminal.wait_for("3 tokens")
        terminal.wait_for(PROMPT)
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0


def test_a_line_can_be_edited(tiny_bundles):
    with Terminal(
        "chat", tiny_bundles / "chat", "--json", "--max-tokens", 2, "--temperature", 0
    ) as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(b"Hx\x7fi\n")
        report = json.loads(re.search(r"\{.*\}", terminal.wait_for(r"\}\s+> $")).group())
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0
    encode_chat = generator(tiny_bundles / "chat").tokenizer.encode_chat
    assert report["prompt_ids"] == encode_chat([("user", "Hi")])


# --- messages and commands -----------------------------------------------------------------------

DONE = rf"\}}\s.*?{PROMPT}"  # a report, and the next message is asked for


def report(screen):
    """The last report that a screen shows."""
    return json.loads(re.findall(r"\{.*\}", screen)[-1])


def asked(bundle, *messages):
    """The prompt of a conversation; of the answers there are only the beginnings known."""
    turns = [("model" if n % 2 else "user", text) for n, text in enumerate(messages)]
    return generator(bundle).tokenizer.encode_chat(turns)


@pytest.mark.parametrize("editor", EDITORS)
def test_a_pasted_text_is_one_message_and_commands_are_none(tiny_bundles, tmp_path, editor):
    bundle, text = tiny_bundles / "chat", "Hi!\n/bye\n\n\tBoat?"
    options = ("--json", "--max-tokens", 2, "--temperature", 0)
    environment = environment_with(editor, tmp_path)
    with Terminal("chat", bundle, *options, environment=environment) as terminal:
        assert "\x1b[?2004h" in terminal.wait_for(PROMPT)  # it wants to know what is pasted
        terminal.keys(b"\x1b[200~" + text.encode() + b"\x1b[201~")
        terminal.wait_for("Boat")
        terminal.keys(b"\n")
        first = report(terminal.wait_for(DONE))
        assert first["prompt_ids"] == asked(bundle, text)
        for command, says in (
            (b"/help", "/clear.*Ctrl-C.*"),
            (b"/?", "/clear.*Ctrl-C.*"),
            (b"/sing a song", "no command /sing; /help lists"),
            (b"  ", ""),
        ):
            terminal.keys(command + b"\n")
            assert "prompt_ids" not in terminal.wait_for(says + ".*" + PROMPT)
        terminal.keys(b" /sing\n")
        second = report(terminal.wait_for(DONE))
        assert second["prompt_ids"] == asked(bundle, text, first["text"], " /sing")
        terminal.keys(b"/reset\n")
        terminal.wait_for("started a new conversation.*" + PROMPT)
        terminal.keys(b"/home/pi is full\n")  # no command has a second /
        assert report(terminal.wait_for(DONE))["prompt_ids"] == asked(bundle, "/home/pi is full")
        terminal.keys(b"exit\n")
        assert terminal.finish() == 0


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit", "quit "])
def test_a_conversation_ends_as_others_do(tiny_bundles, word):
    with Terminal("chat", tiny_bundles / "chat") as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(word.encode() + b"\n")
        assert terminal.finish() == 0
        assert "tokens" not in terminal.screen


@pytest.mark.parametrize(
    "streams", [{}, {"stdout": subprocess.PIPE}], ids=["dumb", "for a program"]
)
def test_lines_that_come_at_once_are_one_message_where_nothing_tells_of_pasting(
    tiny_bundles, streams
):
    bundle = tiny_bundles / "chat"
    options = ("--json", "--max-tokens", 2, "--temperature", 0)
    with Terminal("chat", bundle, *options, **streams) as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(b"Hi!\n/bye\n\nBoat?\n")
        terminal.wait_for(PROMPT if streams else DONE)
        terminal.keys(CTRL_D)
        out = terminal.process.stdout.read().decode() if streams else terminal.screen
        assert terminal.finish() == 0
    assert report(out)["prompt_ids"] == asked(bundle, "Hi!\n/bye\n\nBoat?")


def test_after_the_message_of_the_command_line_it_goes_on_at_a_terminal(tiny_bundles):
    bundle = tiny_bundles / "chat"
    options = ("--json", "--max-tokens", 2, "--temperature", 0, "--prompt", "/bye")
    with Terminal("chat", bundle, *options) as terminal:
        first = report(terminal.wait_for(DONE))
        assert first["prompt_ids"] == asked(bundle, "/bye")  # nobody typed it there
        terminal.keys(b"Boat?\n")
        second = report(terminal.wait_for(DONE))
        assert second["prompt_ids"] == asked(bundle, "/bye", first["text"], "Boat?")
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0


@pytest.mark.parametrize("editor", EDITORS)
def test_a_message_that_does_not_fit_is_left_out_and_the_chat_goes_on(
    tiny_bundles, tmp_path, editor
):
    bundle, environment = tiny_bundles / "short", environment_with(editor, tmp_path)
    options = ("--json", "--max-tokens", 2)
    with Terminal("chat", bundle, *options, environment=environment) as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(b"The\n")
        first = report(terminal.wait_for(DONE))
        terminal.keys(b"gardener gardener gardener gardener\n")
        assert "dropped" in terminal.wait_for("context holds 16.*" + PROMPT)
        terminal.keys(b"A\n")
        second = report(terminal.wait_for(DONE))
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0
    encode = generator(bundle).tokenizer.encode
    assert second["prompt_ids"] == encode(f"The{first['text']}A")


@pytest.mark.sample
@pytest.mark.parametrize("editor", EDITORS)
def test_ctrl_d_while_an_answer_is_written_ends_the_chat_after_it(sample_bundle, tmp_path, editor):
    options = ("--max-tokens", 60, "--temperature", 0)
    environment = environment_with(editor, tmp_path)
    with Terminal("chat", sample_bundle, *options, environment=environment) as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(b"Once upon a time\n")
        terminal.wait_for(r"\r\x1b\[K.{20}")  # the prompt's progress has vanished
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0
        assert "60 tokens" in terminal.screen


@pytest.mark.sample
def test_ctrl_c_before_the_first_word_takes_the_message_back(sample_bundle):
    options = ("--max-tokens", 2, "--temperature", 0, "--prompt", "boat " * 6000)
    with Terminal("chat", sample_bundle, *options) as terminal:
        terminal.wait_for(r"prompt token [\d,]+ of 6,00")
        terminal.keys(CTRL_C)
        assert "message was dropped" in terminal.wait_for(PROMPT)
        terminal.keys(b"Hi\n")
        assert "6,00" not in terminal.wait_for(rf"2 tokens.*{PROMPT}")
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0


@pytest.mark.parametrize(
    "environment, dimmed",
    [(XTERM, True), (XTERM | {"NO_COLOR": ""}, True), (XTERM | {"NO_COLOR": "1"}, False), ({}, False)],
    ids=["a terminal", "empty", "NO_COLOR", "dumb"],
)  # fmt: skip
def test_notes_are_dimmed_unless_that_is_not_wanted(tiny_bundles, environment, dimmed):
    options = ("--prompt", "Hi", "--max-tokens", 1)
    with Terminal("generate", tiny_bundles / "chat", *options, environment=environment) as terminal:
        assert terminal.finish() == 0
    assert ("\x1b[2m" in terminal.screen) == dimmed


# --- who sits where ------------------------------------------------------------------------------


def test_programs_get_nothing_but_reports_while_a_person_types(tiny_bundles):
    with Terminal(
        *("chat", tiny_bundles / "chat", "--json", "--max-tokens", 2), stdout=subprocess.PIPE
    ) as terminal:
        for _ in range(2):
            terminal.wait_for(PROMPT)
            terminal.keys(b"Hi\n")
        terminal.wait_for(PROMPT)
        terminal.keys(CTRL_D)
        out = terminal.process.stdout.read().decode()
        assert terminal.finish() == 0
    assert [len(json.loads(line)["ids"]) <= 2 for line in out.splitlines()] == [True, True]


def test_generate_does_not_wait_for_a_prompt_at_a_terminal(tiny_bundles):
    with Terminal("generate", tiny_bundles / "chat") as terminal:
        assert terminal.finish() == 2
        assert "--prompt" in terminal.screen and terminal.screen.count("\n") == 1


# --- control characters --------------------------------------------------------------------------

STEERING = "a\x1b]0;title\x07\x1b[2J\r\x08\x7f\x9b2J\tb\nc\0"
PICTURES = "a␛]0;title␇␛[2J␍␈␡\ufffd2J\tb\nc"


def test_what_would_steer_the_terminal_is_shown_as_pictures(tiny_bundles):
    options = ("--max-tokens", 60, "--temperature", 3)
    prompted = ("generate", tiny_bundles / "chat", "--prompt", STEERING[:-1], *options)
    for seed in range(1, 9):  # what a seed says differs from processor to processor
        command = (*prompted, "--seed", seed)
        raw = subprocess.run(
            [sys.executable, "-m", "edge_demo.cli.main", *map(str, command)],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode()  # fmt: skip
        said = set(re.findall(r"[\0-\x1f\x7f-\x9f]", raw.removeprefix(STEERING[:-1])))
        if len(said) > 3:
            break
    assert len(said) > 3
    with Terminal(*command, stderr=subprocess.DEVNULL) as terminal:
        assert terminal.finish() == 0
    shown = terminal.screen.replace("\r\n", "\n")
    assert shown.startswith(PICTURES)
    assert not re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert len(shown) == len(raw)
    assert re.sub(r"[\u2400-\u2421\ufffd]", "", shown) == re.sub(
        r"[\0-\x08\x0b-\x1f\x7f-\x9f\ufffd]", "", raw
    )


@pytest.mark.parametrize("command", ["inspect", "chat"])
def test_a_bundle_cannot_steer_the_terminal_by_its_name(tiny_bundles, tmp_path, command):
    bundle = copy_bundle(tiny_bundles / "chat", tmp_path / "bundle")
    edit_manifest(bundle, lambda m: m["model"].update(name=STEERING))
    with Terminal(command, bundle) as terminal:
        if command == "chat":
            terminal.wait_for(PROMPT)
            terminal.keys(CTRL_D)
        assert terminal.finish() == 0
    assert "␛]0;title␇" in terminal.screen and "\x1b]" not in terminal.screen


def test_an_error_cannot_steer_the_terminal(tmp_path):
    with Terminal("inspect", tmp_path / "a\x1b]0;title\x07") as terminal:
        assert terminal.finish() == 2
    assert "a␛]0;title␇ does not exist" in terminal.screen and "\x1b" not in terminal.screen


# --- progress ------------------------------------------------------------------------------------


class Stream(io.StringIO):
    """A stderr that says whether it is a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr("edge_demo.cli.terminal.time.perf_counter", lambda: now[0])
    return now


def test_progress_tells_a_terminal_what_is_left(monkeypatch, clock):
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("window")
    for clock[0], done in ((40, 1), (7000, 2), (7001, 1999), (8000, 2000)):
        progress(done, 2000)
    assert stream.getvalue() == (
        "\rwindow 1 of 2,000, 22 h 12 min left\x1b[K"
        "\rwindow 2 of 2,000, 1942 h 30 min left\x1b[K"
        "\rwindow 1,999 of 2,000, 4 s left\x1b[K"
        "\rwindow 2,000 of 2,000\x1b[K\n"
    )


def test_progress_that_vanishes_leaves_an_empty_line(monkeypatch, clock):
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("prompt token", vanishes=True)
    clock[0] = 3
    progress(512, 1024)
    progress(1024, 1024)
    assert stream.getvalue() == "\rprompt token 512 of 1,024, 3 s left\x1b[K\r\x1b[K"


def test_progress_tells_a_log_now_and_then(monkeypatch, clock):
    stream = Stream(terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("task", every_s=30)
    for done in range(1, 11):
        clock[0] = 9 * done
        progress(done, 10)
    assert stream.getvalue() == "task 4 of 10, 54 s left\ntask 8 of 10, 18 s left\n"
    clock[0] = 1000
    progress(5, 10)
    assert stream.getvalue().endswith("task 5 of 10, 16 min 40 s left\n")
