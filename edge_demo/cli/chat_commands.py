"""Implements the commands of `chat`, such as `/help`, which are typed instead of a message."""

from __future__ import annotations

from pathlib import Path

from edge_demo.bundle.reader import Bundle
from edge_demo.cli.chat_settings import NAMES, ChatSettings
from edge_demo.cli.talk import Talk
from edge_demo.cli.terminal import note
from edge_demo.cli.typed_text import NOTHING, Command
from edge_demo.device.hardware import celsius
from edge_demo.device.memory_limits import peak_rss_bytes
from edge_demo.errors import RequestError, brief
from edge_demo.text.generator import Generator
from edge_demo.text.saved_chat import read_chat, write_chat
from edge_demo.text.session import ChatSession
from edge_demo.units import megabytes

ENDS = ("bye", "exit", "quit")
_HELP = '''\
/help, /?           show this
/show               show model, context, settings and memory
/system [TEXT]      show the system text, or set it; /system "" removes it
/set [NAME VALUE]   show the settings, or change one
/undo               take the last message and its answer back
/regen              answer the last message again
/save FILE          save the conversation as JSON
/load FILE          go on from a saved conversation
/clear, /reset      begin a new conversation
/bye, /exit         end; exit, quit and Ctrl-D too
"""                 begin and end a message of several lines
Ctrl-C              stop an answer, or throw away what is typed
A text that begins with / is sent where a space stands before it.'''


class ChatCommands:
    """What commands do in a chat.

    Args:
        bundle: that is run.
        generator: that answers.
        session: of the chat.
        talk: shows answers.
    """

    def __init__(
        self, bundle: Bundle, generator: Generator, session: ChatSession, talk: Talk
    ) -> None:
        self._bundle = bundle
        self._context = generator.engine.context_length
        self._session = session
        self._settings = ChatSettings(bundle, generator, session)
        self._talk = talk
        self._commands = {
            "help": self._help,
            "?": self._help,
            "show": self._show,
            "system": self._system,
            "set": self._set,
            "undo": self._undo,
            "regen": self._regenerate,
            "save": self._save,
            "load": self._load,
            "clear": self._clear,
            "reset": self._clear,
        }

    def obey(self, command: Command) -> None:
        """Do what a command says; an unknown or impossible one gets a note."""
        do = self._commands.get(command.name)
        if do is None:
            note(
                f"there is no command /{brief(command.name, 40)}; /help lists the commands. To "
                "send it as a message, begin with a space"
            )
            return
        try:
            do(command.argument)
        except RequestError as error:
            note(str(error))

    def _help(self, _: str) -> None:
        note(_HELP)

    def _clear(self, _: str) -> None:
        self._session.clear()
        note("started a new conversation")

    def _show(self, _: str) -> None:
        session, degrees = self._session, celsius()
        tuned = self._bundle.tokenizer.chat is not None
        memory = megabytes(peak_rss_bytes())
        lines = [
            f"model     {self._bundle.name} ({self._bundle.recipe}), "
            f"{'instruction-tuned' if tuned else 'a base model'}",
            *([f"system    {session.system or 'none'}"] if tuned else ()),
            f"context   {session.num_tokens:,} of {self._context:,} tokens",
            f"turns     {_turns(len(session))}",
            f"settings  {', '.join(map(self._settings.shown, NAMES))}",
            f"memory    {memory}" + (f", {degrees:.0f} °C" if degrees is not None else ""),
        ]
        note("\n".join(lines))

    def _system(self, text: str) -> None:
        self._check_tuned()
        if not text:
            note(self._session.system or "there is no system text; /system TEXT sets it")
            return
        self._session.replace("" if text == NOTHING else text, self._session.turns)
        what = "removed the system text" if text == NOTHING else "set the system text"
        stays = f"; {_turns(len(self._session))} stay and run again" if len(self._session) else ""
        note(f"{what}{stays}")

    def _check_tuned(self) -> None:
        if self._bundle.tokenizer.chat is None:
            raise RequestError(f"{self._bundle.name} is a base model, which has no system text")

    def _set(self, text: str) -> None:
        if text:
            note(self._settings.change(text))
        else:
            note("\n".join(map(self._settings.shown, NAMES)))

    def _undo(self, _: str) -> None:
        message = self._session.undo()
        if message is None:
            raise RequestError("there is no message to take back")
        note(f"took back: {brief(message, 60)}")

    def _regenerate(self, _: str) -> None:
        sampler = self._session.sampler
        if len(self._session) and sampler.temperature == 0:
            note("the temperature is 0, so the answer will hardly change; /set temperature 1 helps")
        elif len(self._session) and sampler.seed is not None:
            note("the random numbers of the seed go on, so the answer can be another one")
        self._talk.answer(None)

    def _save(self, name: str) -> None:
        if not self._session.turns:
            raise RequestError("there is no conversation to save yet")
        path = _path(name, "/save")
        write_chat(path, self._session.system, self._session.turns)
        note(f"saved {_turns(len(self._session))} to {brief(path)}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        system, turns = read_chat(path)
        if system:
            self._check_tuned()
        waits = turns[-1][1] if turns[-1][0] == "user" else None
        self._session.replace(system, turns if waits is None else turns[:-1])
        having = "with" if system else "without"
        note(f"loaded {_turns(len(turns))} from {brief(path)}, {having} a system text")
        if waits is not None:
            self._talk.answer(waits)


def _path(name: str, command: str) -> Path:
    if not name:
        raise RequestError(f"the file is missing; write {command} FILE")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no home folder
        return Path(name)


def _turns(count: int) -> str:
    asked, answered = (count + 1) // 2, count // 2
    return (
        f"{asked:,} {'message' if asked == 1 else 'messages'} and "
        f"{answered:,} {'answer' if answered == 1 else 'answers'}"
    )
