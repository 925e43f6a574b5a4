"""What can be typed in a chat: commands, blocks of several lines, and what was typed before."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from edge_demo.cli import history, talk
from edge_demo.cli.chat_commands import ChatCommands
from edge_demo.cli.history import TypedHistory
from edge_demo.cli.main import _parser
from edge_demo.cli.typed_text import NOTHING, Command, is_open, meaning
from edge_demo.errors import RequestError
from edge_demo.text import saved_chat
from edge_demo.text.answer import Completion
from edge_demo.text.saved_chat import read_chat, write_chat
from edge_demo.text.session import ChatSession
from tests.edge_demo.conftest import generator
from tests.edge_demo.pseudo_terminal import (
    CTRL_C,
    CTRL_D,
    EDITORS,
    PROMPT,
    UP,
    Terminal,
    environment_with,
)

# --- what a typed text means ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, means",
    [
        ("Hi", "Hi"),
        (" /help", " /help"),
        ("/home/pi is full", "/home/pi is full"),
        ("/help\nme", "/help\nme"),
        ("/HELP  me ", Command("help", "me")),
        ("/?", Command("?", "")),
        ("quit ", Command("quit", "")),
        ('"""/bye"""', "/bye"),
        ('"""\nThe\n\n boat\n"""', "The\n\n boat"),
        ('"""The\nboat"""  ', "The\nboat"),
        ('""""""', ""),
        ('"""A "quoted" """ word\n"""', 'A "quoted" """ word'),
        ('/system """Be\nbrief."""', Command("system", "Be\nbrief.")),
        ('/system """"""', Command("system", NOTHING)),
        ('/system ""', Command("system", NOTHING)),
        # a pasted program, whose quotes are its own
        ('"""What it does."""\nprint("Hi")', '"""What it does."""\nprint("Hi")'),
        ('say """Hi"""', 'say """Hi"""'),
    ],
)
def test_a_typed_text_is_a_message_or_a_command(text, means):
    assert not is_open(text)
    assert meaning(text) == means


@pytest.mark.parametrize(
    "text", ['"""', '"""The', '"""\n/bye\n', '/system """Be', '"""A """ word\n', '/SYSTEM   """']
)
def test_a_block_is_open_until_a_line_ends_with_its_quotes(text):
    assert is_open(text)
    assert not is_open(f'{text}\nend """')
    assert not is_open(f" {text}")  # a space before it, as before a command


# --- what was typed before -----------------------------------------------------------------------


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The file of typed texts."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/gemma-keras/chat-history"


def test_typed_texts_are_kept_for_the_next_chat_and_for_nobody_else(state):
    first, beside = TypedHistory(keep=True), TypedHistory(keep=True)
    for text in ("Hi", "The\n\tboat ", "The\n\tboat ", "é😀\ud800"):
        first.add(text)
    beside.add("/bye")
    assert TypedHistory(keep=True).entries == ["Hi", "The\n\tboat ", "é😀\ud800", "/bye"]
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) & 0o077 == 0


def test_without_history_nothing_is_read_or_written(state):
    TypedHistory(keep=True).add("Hi")
    before = state.read_bytes()
    without = TypedHistory(keep=False)
    without.add("Boat")
    assert without.entries == ["Boat"] and state.read_bytes() == before


def test_typed_texts_are_bounded(state, monkeypatch):
    monkeypatch.setattr(history, "_MOST", 5)
    monkeypatch.setattr(history, "_LONGEST", 50)
    typed = TypedHistory(keep=True)
    for number in range(8):
        typed.add(str(number))
    typed.add("long" * 20)  # stays in this chat
    assert typed.entries[-1] == "long" * 20
    assert TypedHistory(keep=True).entries == list("34567")
    assert state.read_text().split() == [f'"{n}"' for n in "34567"]
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    monkeypatch.setattr(history, "_MOST_BYTES", 10)  # two and a half of them
    assert TypedHistory(keep=True).entries == list("67")
    assert state.read_text().split() == [f'"{n}"' for n in "67"]


def test_a_damaged_line_is_left_out(state):
    TypedHistory(keep=True).add("Hi")
    with state.open("ab") as file:
        file.write(b'\n3\n"half\n\xff\n"a\\u0000b"\n' + b"[" * 100_000 + b'\n"Boat"\n')
    assert TypedHistory(keep=True).entries == ["Hi", "Boat"]


def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    typed = TypedHistory(keep=True)
    typed.add("Hi")
    assert typed.entries == ["Hi"]
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert TypedHistory(keep=True).entries == []


# --- saved conversations -------------------------------------------------------------------------

TURNS = (("user", "Hi\n"), ("model", "Yes é😀"))


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("turns", [TURNS, (*TURNS, ("user", "And?"))])
def test_a_saved_conversation_is_read_as_it_was(tmp_path, system, turns):
    path = tmp_path / "chat.json"
    for _ in range(2):  # a conversation may be replaced
        write_chat(path, system, turns)
    assert read_chat(path) == (system, turns)
    roles = [message["role"] for message in json.loads(path.read_text())["messages"]]
    assert roles == ["system"] * bool(system) + ["user", "assistant", "user"][: len(turns)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["chat.json"]


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a conversation"),
        (b'{"messages": [], "tools": []}', "is not a conversation"),
        (b'{"messages": []}', '"messages" must be a list'),
        (b'{"messages": {"role": "user"}}', '"messages" must be a list'),
        (b'{"messages": ["Hi"]}', "message 1 must have"),
        (b'{"messages": [{"role": "assistant"}]}', "message 1 must have"),
        (b'{"messages": [{"role": "assistant", "content": "Hi"}]}', "'assistant' instead of user"),
        (b'{"messages": [{"role": "system", "content": "Be"}]}', "the last of"),
    ],
    ids=str,
)
def test_what_is_no_conversation_is_neither_read_nor_replaced(tmp_path, data, says):
    path = tmp_path / "other"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=says) as error:
        read_chat(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RequestError, match="is not a saved conversation; choose another name"):
        write_chat(path, "", TURNS)
    assert path.read_bytes() == data


def test_files_that_cannot_be_read_or_written_are_a_sentence(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("pipe", "link", "."):
        with pytest.raises(RequestError):
            read_chat(tmp_path / name)
        with pytest.raises(RequestError, match="choose another name"):
            write_chat(tmp_path / name, "", TURNS)
    for path in (tmp_path / "folder/chat", Path("a\0b")):
        for act in (read_chat, lambda p: write_chat(p, "", TURNS)):
            with pytest.raises(RequestError, match=r"the conversation cannot be (read|written): "):
                act(path)
    write_chat(tmp_path / "chat", "", TURNS)
    monkeypatch.setattr(saved_chat, "_LARGEST", 50)
    with pytest.raises(RequestError, match="larger than 50 bytes"):
        read_chat(tmp_path / "chat")


# --- commands ------------------------------------------------------------------------------------


class Chat:
    """A chat in this process, as `edge-demo chat` makes it for a person."""

    def __init__(self, capsys, bundle, *options):
        arguments = _parser().parse_args(["chat", *map(str, (bundle, *options))])
        answering = talk.Answering(arguments)
        opened, self.generator, drafter = answering.load()
        self.session = ChatSession(
            self.generator,
            answering.sampler,
            arguments.max_tokens,
            arguments.system,
            drafter,
            answering.stop,
        )
        self._talk = talk.Talk(answering, self.generator, self.session, False, False)
        self._commands = ChatCommands(opened, self.generator, self.session, self._talk)
        self._capsys = capsys

    def type(self, text):
        """What is noted when a text is typed."""
        said = meaning(text)
        if isinstance(said, Command):
            self._commands.obey(said)
        else:
            assert self._talk.answer(said)
        return self._capsys.readouterr().err

    @property
    def asked(self):
        return [text for speaker, text in self.session.turns if speaker == "user"]


@pytest.fixture
def chat(tiny_bundles, monkeypatch, capsys):
    """Begin a chat with the tuned bundle, or with another."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)

    def begin(*options, bundle="chat"):
        return Chat(capsys, tiny_bundles / bundle, "--max-tokens", 4, *options)

    return begin


def test_undo_takes_back_the_last_message_and_its_answer(chat):
    here = chat("--temperature", 0)
    assert "no message" in here.type("/undo")
    here.type("Hi")
    first = here.session.turns
    here.type("Boat?")
    assert here.type("/undo") == "took back: Boat?\n"
    assert here.session.turns == first
    here.type("/undo")
    assert len(here.session) == 0


def test_regen_answers_again_with_another_draw(chat):
    here = chat("--temperature", 3, "--top-k", 200, "--seed", 1)
    assert "there is no answer yet" in here.type("/regen")
    here.type("Hi")
    here.type("Boat?")
    *before, (_, first) = here.session.turns
    seen = {first}
    for _ in range(3):
        assert "random numbers of the seed go on" in here.type("/regen")
        *turns, (speaker, answer) = here.session.turns
        assert turns == before and speaker == "model"
        seen.add(answer)
    assert len(seen) > 2


def test_regen_says_that_greedy_decoding_gives_the_same(chat):
    here = chat("--temperature", 0)
    here.type("Hi")
    turns = here.session.turns
    assert "the temperature is 0" in here.type("/regen")
    assert here.session.turns == turns


def test_an_answer_that_is_stopped_before_its_first_token_does_not_replace_the_former(
    chat, monkeypatch
):
    here = chat()
    here.type("Hi")
    turns = here.session.turns

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(talk.Progress, "__call__", interrupted)
        assert "[interrupted] the former answer stays" in here.type("/regen")
        assert here.session.turns == turns
        assert "[interrupted] the message was dropped" in here.type("Boat?")
    assert here.session.turns == turns
    here.type("Boat?")
    assert here.asked == ["Hi", "Boat?"]


def test_the_system_text_is_shown_set_and_removed_and_the_turns_stay(chat):
    here = chat("--system", "Be kind.")
    assert here.type("/system") == "Be kind.\n"
    here.type("Hi")
    turns = here.session.turns
    says = here.type('/system """Be\nbrief."""')
    assert says == "set the system text; 1 message and 1 answer stay and run again\n"
    assert here.session.turns == turns and here.session.system == "Be\nbrief."
    here.type("Boat?")
    encode = here.generator.tokenizer.encode_chat
    expected = encode((*turns, ("user", "Boat?")), "Be\nbrief.")
    assert here.generator.engine.tokens[: len(expected)] == expected
    here.type("/clear")
    assert here.generator.engine.tokens == here.session.system_ids
    assert here.type('/system ""') == "removed the system text\n"
    assert "there is no system text" in here.type("/system")
    assert "context holds 128" in here.type(f"/system {'boat ' * 200}")
    assert here.session.system == ""


def test_a_base_model_has_no_system_text(chat, tmp_path):
    here = chat(bundle="gemma3-fp32")
    for text in ("/system", "/system Be kind."):
        assert "is a base model, which has no system text" in here.type(text)
    write_chat(tmp_path / "chat", "Be kind.", TURNS)
    assert "is a base model" in here.type(f"/load {tmp_path / 'chat'}")
    write_chat(tmp_path / "chat", "", TURNS)
    here.type(f"/load {tmp_path / 'chat'}")
    assert here.session.turns == TURNS
    assert "a base model" in here.type("/show") and "system" not in here.type("/show")


def test_show_says_what_there_is(chat):
    here = chat("--system", "Be kind.", "--top-k", 7)
    here.type("Hi")
    (_, asked), (_, answered) = here.session.turns
    tokenizer = here.generator.tokenizer
    whole = tokenizer.encode_chat([("user", asked), ("model", answered)], "Be kind.")
    opening = whole[::-1].index(tokenizer.spec.chat.start_of_turn) + 1  # of the next turn
    tokens = whole[:-opening]
    shown = here.type("/show")
    assert f"context   {len(tokens)} of 128 tokens" in shown
    for part in (
        "instruction-tuned",
        "Be kind.",
        "1 message and 1 answer",
        "top-k 7",
        "memory    ",
    ):
        assert part in shown


def test_a_conversation_is_saved_and_gone_on_with(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    here = chat("--system", "Be kind.", "--temperature", 0)
    assert "no conversation to save" in here.type("/save ~/a chat.json")
    here.type("Hi")
    assert "1 message and 1 answer" in here.type("/save ~/a chat.json")
    here.type("Boat?")
    there = chat("--temperature", 0)
    there.type("Never mind")
    says = there.type("/load ~/a chat.json")
    assert "1 message and 1 answer" in says and "with a system text" in says
    there.type("Boat?")
    assert there.session.turns == here.session.turns and there.session.system == "Be kind."
    there.type("/undo")
    assert there.asked == ["Hi"]


def test_a_conversation_that_waits_for_an_answer_gets_one(chat, tmp_path):
    here = chat()
    write_chat(tmp_path / "chat", "", (*TURNS, ("user", "And?")))
    assert "2 messages and 1 answer" in here.type(f"/load {tmp_path / 'chat'}")
    assert here.asked == ["Hi\n", "And?"] and len(here.session) == 4


def test_what_cannot_be_loaded_changes_nothing(chat, tmp_path):
    here = chat("--system", "Be kind.")
    here.type("Hi")
    turns = here.session.turns
    write_chat(tmp_path / "long", "", [("user", "boat " * 200), ("model", "")])
    assert "but the context holds 128" in here.type(f"/load {tmp_path / 'long'}")
    assert "write /load FILE" in here.type("/load")
    assert "write /save FILE" in here.type("/save")
    assert "No such file" in here.type(f"/load {tmp_path / 'nowhere'}")
    assert (here.session.turns, here.session.system) == (turns, "Be kind.")


# --- settings ------------------------------------------------------------------------------------


def test_every_setting_is_shown_and_changed_by_its_name(chat):
    here = chat()
    for text, shown in (
        ("temperature 0.5", "temperature 0.5"),
        ("top-k 3", "top-k 3"),
        ("top_p=0.5", "top-p 0.5"),
        ("min-p .1", "min-p 0.1"),
        ("seed 7", "seed 7"),
        ("repeat_penalty 1.5", "repeat-penalty 1.5"),
        ("Presence-Penalty 1", "presence-penalty 1.0"),
        ("frequency_penalty 1", "frequency-penalty 1.0"),
        ("repeat-last-n 9", "repeat-last-n 9"),
        ("max-tokens 2", "max-tokens 2"),
        ("overflow stop", "overflow stop"),
    ):
        assert here.type(f"/set {text}") == f"{shown}\n"
        assert here.type(f"/set {shown.split()[0]}") == f"{shown}\n"
        assert shown in here.type("/set").splitlines()
        assert shown in here.type("/show")
    assert "2 tokens" in here.type("Hi")
    assert here.session.sampler.top_k == 3
    assert here.type("/set seed none") == "seed none\n"


@pytest.mark.parametrize(
    "text, says",
    [
        ("temperature -1", "temperature must be between 0 and 100, not -1.0"),
        ("temperature nan", "temperature must be between 0 and 100, not nan"),
        ("temperature hot", "temperature must be a number, not 'hot'"),
        ("top-p 0", "top-p must be above 0 and at most 1, not 0"),
        ("top-k 1.5", "top-k must be a whole number, not '1.5'"),
        ("top-k -3", "top-k must not be negative, but is -3"),
        ("seed x", "seed must be a whole number, not 'x'"),
        ("repeat-last-n -2", "repeat-last-n must be a number of tokens, or -1 for all, not -2"),
        ("max-tokens 0", "max-tokens: '0' is not a positive whole number"),
        ("overflow never", "overflow must be stop or drop-oldest, not 'never'"),
        ("heat 1", "there is no setting 'heat'; the settings are temperature, top-k,"),
    ],
)
def test_a_value_that_is_not_valid_is_refused(chat, text, says):
    here = chat()
    before = here.type("/set")
    assert says in here.type(f"/set {text}")
    assert here.type("/set") == before


def test_a_setting_that_the_open_engine_cannot_serve_is_refused_with_the_option(chat):
    here = chat("--top-k", 5, "--temperature", 1)
    for setting in ("top-k 0", "top-k 257", "repeat-penalty 0.5"):
        says = here.type(f"/set {setting}")
        assert "256 likeliest" in says and f"start edge-demo chat with --{setting}" in says
    assert here.session.sampler.top_k == 5 and here.session.sampler.repeat_penalty == 1
    here.type("Hi")  # and the engine can still serve it
    assert len(here.session) == 2
    there = chat("--top-k", 0, "--temperature", 1)
    for setting in ("top-k 5", "top-k 0", "repeat-penalty 0.5"):
        assert there.type(f"/set {setting}") == f"{setting}\n"


def test_another_setting_leaves_the_random_numbers_of_a_seed_and_the_seed_begins_them(chat):
    def drawn(*commands):
        here = chat("--seed", 3, "--temperature", 5, "--top-k", 200)
        here.type("Hi")
        for command in commands:
            here.type(command)
        here.type("/regen")
        first = here.session.turns[1][1]
        return first

    went_on = drawn()
    assert drawn("/set temperature 5") == drawn("/set top-k 200") == went_on
    assert drawn("/set seed 3") != went_on


# --- a full context ------------------------------------------------------------------------------


def test_with_the_overflow_stop_a_message_without_room_is_refused_with_the_counts(chat):
    here = chat()
    here.type("/set overflow stop")
    message = "The boat went down the river"
    for _ in range(20):
        turns, tokens = here.session.turns, here.session.num_tokens
        says = here.type(message)
        if "dropped" in says:
            break
    prompt = here.generator.tokenizer.encode_chat((*turns, ("user", message)))
    assert len(prompt) > 128 and here.session.turns == turns
    assert f"has {tokens} tokens and this message {len(prompt) - tokens}" in says
    assert "context holds 128; /clear begins" in says and "/set overflow drop-oldest" in says
    here.type("/set overflow drop-oldest")
    says = here.type(message)
    left = len(here.generator.tokenizer.encode_chat(here.session.turns[:-1]))
    assert f"has {len(prompt)} tokens" in says and f"{left} tokens remain" in says
    went = (len(turns) - len(here.session) + 2) // 2
    assert went > 1 and f"the oldest {went} messages and answers were dropped" in says


@pytest.mark.parametrize(
    "overflow, then", [("stop", "/clear begins"), ("drop-oldest", "the next message drops")]
)
def test_an_answer_that_fills_the_context_says_so(chat, overflow, then):
    here = chat("--max-tokens", 50, bundle="short")
    here.type(f"/set overflow {overflow}")
    says = here.type("The")
    assert "[context] " in says and "the context of 16 tokens is full" in says and then in says


# --- the line after an answer --------------------------------------------------------------------


@pytest.mark.parametrize(
    "degrees, reused, expected",
    [
        (61.2, 770, "3 tokens · first token 0.3 s · 18 tokens/s · 813 of 4,096 context · 770 cached · 512 MB · 61 °C"),
        (None, 0, "3 tokens · first token 0.3 s · 18 tokens/s · 813 of 4,096 context · 512 MB"),
    ],
)  # fmt: skip
def test_the_figures_of_an_answer(monkeypatch, degrees, reused, expected):
    monkeypatch.setattr(talk, "celsius", lambda: degrees)
    monkeypatch.setattr(talk, "peak_rss_bytes", lambda: 512_000_000)
    answer = Completion([1] * 810, [1] * 3, reused_tokens=reused, prefill_s=0.31, decode_s=2 / 18)
    assert talk.figures(answer, 4096) == expected


def test_each_answer_has_a_line_of_figures(chat):
    here = chat("--temperature", 0)
    here.type("Hi")
    says = here.type("Boat?")
    used = len(here.generator.tokenizer.encode_chat(here.session.turns[:-1])) + 4
    assert re.match(
        rf"\[length\] 4 tokens · first token \d+\.\d s · \d+ tokens/s · {used} of 128 context · "
        r"\d+ cached · [\d.]+ [MG]B( · \d+ °C)?\n$",
        says,
    )


# --- at a terminal -------------------------------------------------------------------------------

DONE = rf"\}}\s.*?{PROMPT}"
MORE = r"\.\.\.(?: |\x1b\[3D\x1b\[4C)(?:\x1b\[[0-9;?]*[a-zA-Z])*"
OPTIONS = ("--json", "--max-tokens", 2, "--temperature", 0)


def prompt_ids(screen):
    return json.loads(re.findall(r"\{.*\}", screen)[-1])["prompt_ids"]


def asked(bundle, *messages):
    return generator(bundle).tokenizer.encode_chat([("user", text) for text in messages])


@pytest.mark.parametrize("editor", EDITORS)
def test_lines_in_a_block_and_pasted_lines_are_one_message_and_come_back_in_the_next_chat(
    tiny_bundles, tmp_path, editor
):
    bundle = tiny_bundles / "chat"
    environment = environment_with(editor, tmp_path / "hidden")
    environment = environment | {"XDG_STATE_HOME": str(tmp_path / "state")}

    def begin(*options):
        return Terminal("chat", bundle, *OPTIONS, *options, environment=environment)

    with begin() as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(b"\x1b[200~Hi!\n/bye\nBoat?\n\x1b[201~")
        terminal.wait_for("Boat")
        terminal.keys(b"\n")
        assert prompt_ids(terminal.wait_for(DONE)) == asked(bundle, "Hi!\n/bye\nBoat?")
        terminal.keys(b"/clear\n")
        terminal.wait_for("started a new conversation.*" + PROMPT)
        terminal.keys(b'"""The\n')
        terminal.wait_for(MORE)
        terminal.keys(b"/bye\n")
        terminal.wait_for(MORE)
        terminal.keys(b'boat"""\n')
        assert prompt_ids(terminal.wait_for(DONE)) == asked(bundle, "The\n/bye\nboat")
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0
    with begin() as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(UP)
        terminal.wait_for('boat"""')
        terminal.keys(b"\n")
        assert prompt_ids(terminal.wait_for(DONE)) == asked(bundle, "The\n/bye\nboat")
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0
    kept = tmp_path / "state/gemma-keras/chat-history"
    texts = ["Hi!\n/bye\nBoat?", "/clear", '"""The\n/bye\nboat"""']
    assert [json.loads(line) for line in kept.read_text().splitlines()] == texts
    with begin("--no-history") as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(UP + b"Hi\n")
        assert prompt_ids(terminal.wait_for(DONE)) == asked(bundle, "Hi")
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0
    assert len(kept.read_text().splitlines()) == len(texts)


def test_a_block_is_one_message_on_a_dumb_terminal(tiny_bundles):
    bundle = tiny_bundles / "chat"
    with Terminal("chat", bundle, *OPTIONS) as terminal:
        terminal.wait_for(PROMPT)
        terminal.keys(b'"""\n')
        terminal.wait_for(MORE)
        terminal.keys(b"The\n")
        terminal.wait_for(MORE)
        terminal.keys(b'boat\n"""\n')  # as pasted
        assert prompt_ids(terminal.wait_for(DONE)) == asked(bundle, "The\nboat")
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0


@pytest.mark.parametrize("editor", EDITORS)
def test_ctrl_c_throws_away_what_is_typed_and_ctrl_d_ends(tiny_bundles, tmp_path, editor):
    bundle, environment = tiny_bundles / "chat", environment_with(editor, tmp_path)
    with Terminal("chat", bundle, "--max-tokens", 3, environment=environment) as terminal:
        terminal.wait_for(PROMPT)
        for typed, shown in ((b"never mind", "never mind"), (b'"""A\nB', rf"{MORE}B")):
            terminal.keys(typed)
            terminal.wait_for(shown)
            terminal.keys(CTRL_C)
            try:
                terminal.wait_for(PROMPT, seconds=10)
            except AssertionError:
                # A signal that comes just before readline waits for a key is heard at the next key.
                terminal.keys(CTRL_C)
                terminal.wait_for(PROMPT)
        assert " tokens" not in terminal.screen
        terminal.keys(b"Hi\n")
        line = terminal.wait_for(r"\[length\].*?MB.*?" + PROMPT)
        assert "3 tokens · first token" in line and "of 128 context" in line
        terminal.keys(CTRL_D)
        assert terminal.finish() == 0
