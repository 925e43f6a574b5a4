"""`edge-demo chat`: a conversation at a terminal, or a message from a pipe."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_demo.cli import options
from edge_demo.errors import INTERRUPTED, EdgeError, RequestError, brief

if TYPE_CHECKING:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.answering import Answering
    from edge_demo.text.answer import Completion
    from edge_demo.text.generator import CompletionStream, Generator
    from edge_demo.text.session import ChatSession

TEXT = "Chat with a model, or continue text in turns with a base model."
_HELP = """\
/clear, /reset   begin a new conversation
/bye, /exit      end; exit, quit and Ctrl-D too
/help            show this
Ctrl-C           stop an answer, or throw away what is typed
A text that begins with / is sent where a space stands before it."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `chat` takes."""
    options.add_bundle(parser)
    parser.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="the first message; if stdin is not a terminal, it is the only message and stdin "
        "is not read. Without --prompt a piped text is one message; NUL characters "
        "separate several",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        default="",
        help="system text for an instruction-tuned model, before the first message",
    )
    options.add_engine(parser)
    options.add_sampling(parser, options.Sampling(512, 1.0, 64, 0.95))
    options.add_prompt_cache(parser, "the --system text, or of the first message without one,")


def run(arguments: argparse.Namespace) -> int:
    """Talk in turns."""
    from edge_demo.cli.answering import Answering
    from edge_demo.cli.terminal import note
    from edge_demo.text.session import ChatSession

    if arguments.prompt is not None and not arguments.prompt.strip():
        raise RequestError("--prompt is empty; give a message, or remove --prompt")
    answering = Answering(arguments)
    messages = _messages(arguments.prompt)
    only_keeps = arguments.system and arguments.prompt_cache  # which needs no message
    if not sys.stdin.isatty() and not only_keeps:
        messages = _ahead(messages)  # before anything is loaded
    bundle, generator, drafter = answering.load()
    tuned = bundle.tokenizer.chat is not None
    if arguments.system and not tuned:
        raise RequestError(
            f"{bundle.name} is a base model, which has no system text; remove --system"
        )
    session = ChatSession(
        generator,
        answering.sampler,
        arguments.max_tokens,
        arguments.system,
        drafter,
        answering.stop,
    )
    _run_system(answering, generator, session.system_ids)
    note(_greeting(bundle))
    talk = _Talk(arguments, answering, generator, session)
    for number, message in enumerate(messages):
        typed = sys.stdin.isatty() and (number > 0 or arguments.prompt is None)
        if typed and (command := _command(message)):
            if command in ("bye", "exit", "quit"):
                break
            talk.obey(command)
            continue
        try:
            goes_on = talk.answer(message)
        except KeyboardInterrupt:  # another one, while the first was told
            goes_on = sys.stdin.isatty()
            print(file=sys.stderr)
        if not goes_on:
            return INTERRUPTED
    return 0


def _greeting(bundle: Bundle) -> str:
    kind = (
        "instruction-tuned: it answers in its turn template."
        if bundle.tokenizer.chat is not None
        else "a base model: it continues your text and is not tuned to answer."
    )
    keys = " Ctrl-C stops an answer, Ctrl-D ends, /help shows more." if sys.stdin.isatty() else ""
    return f"{bundle.name} ({bundle.recipe}), {kind}{keys}"


def _messages(first: str | None) -> Iterator[str]:
    """The user's messages, as they come; none is empty."""
    from edge_demo.cli.typed import piped_messages, typed_message

    if first is not None:
        yield first
    if sys.stdin.isatty():
        while (message := typed_message()) is not None:
            if message.strip():
                yield message
    elif first is None:
        yield from piped_messages()


def _ahead(messages: Iterator[str]) -> Iterator[str]:
    """The same messages, the first of which is there.

    Raises:
        RequestError: there is none.
    """
    first = next(messages, None)
    if first is None:
        raise RequestError("stdin is empty; give a message there, or with --prompt")

    def all_of_them() -> Iterator[str]:
        yield first
        yield from messages

    return all_of_them()


def _command(message: str) -> str | None:
    """The name of a command that was typed in place of a message; `None` if it is a message.

    A path, such as `/home/pi`, is one.
    """
    if message.rstrip() in ("exit", "quit"):
        return message.rstrip()
    match = re.match(r"/([A-Za-z?]+)(\s|$)", message)
    return match[1].lower() if match and "\n" not in message.strip() else None


def _run_system(answering: Answering, generator: Generator, ids: list[int]) -> None:
    """Have the engine hold the tokens that every conversation begins with."""
    cache, engine = answering.cache, generator.engine
    if ids:
        engine.check(ids)
    cache.load(engine)
    if ids and generator.prepare(ids) < len(ids):
        cache.save(engine)
        cache.tell()


class _Talk:
    """A chat at a terminal or in a pipe: each turn is run and shown."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        answering: Answering,
        generator: Generator,
        session: ChatSession,
    ) -> None:
        self._json = arguments.json
        self._answering = answering
        self._engine = generator.engine
        self._session = session
        self._keeps_first = not arguments.system  # in the prompt cache

    def obey(self, command: str) -> None:
        """Do what a command says; an unknown one gets a note."""
        from edge_demo.cli.terminal import note

        if command in ("clear", "reset"):
            self._session.clear()
            note("started a new conversation")
        elif command in ("help", "?"):
            note(_HELP)
        else:
            note(
                f"there is no command /{brief(command, 40)}; /help lists the commands. To "
                "send it as a message, begin with a space"
            )

    def answer(self, message: str) -> bool:
        """Answer a message; `False` where it was stopped and nobody is there to go on.

        Raises:
            EdgeError: there can be no answer; at a terminal a message too long gets a note.
        """
        from edge_demo.cli.terminal import note, show

        stream, stopped = None, False
        try:
            stream = self._begin(message)
            for piece in stream:
                if not self._json:
                    show(piece.text)
        except KeyboardInterrupt:
            stopped = True
        except RequestError as error:
            if stream is not None:
                self._session.take_back()
            if not sys.stdin.isatty():
                raise
            note(f"{error}. The message was dropped")
            return True
        except EdgeError:
            if stream is not None and stream.completion.ids and not self._json:
                show("\n")  # what is said next begins a line
            raise
        if stream is not None:
            self._keep(stream.completion)
        return sys.stdin.isatty() or not stopped

    def _begin(self, message: str) -> CompletionStream:
        from edge_demo.cli.terminal import Progress, note

        stream = self._session.send(
            message,
            Progress("prompt token", vanishes=True),
            on_held=self._save_first if self._keeps_first else None,
        )
        if self._session.dropped:
            note(_dropped(self._session.dropped, self._engine.context_length))
        return stream

    def _save_first(self, held: Completion) -> None:
        self._keeps_first = False
        self._answering.cache.save_prompt(self._engine, held)

    def _keep(self, completion: Completion) -> None:
        """Make the answer a turn, and say how it ended."""
        from edge_demo.cli.terminal import note, show

        kept = self._session.keep(completion)
        if self._json:
            print(json.dumps(self._answering.report(completion)), flush=True)
        else:
            show("\n")
            length = f"{len(completion.ids):,} tokens" if kept else "the message was dropped"
            note(f"[{completion.finish_reason}] {length}")
        self._answering.cache.tell()


def _dropped(count: int, context: int) -> str:
    what = "message and its answer were" if count == 1 else f"{count:,} messages and answers were"
    return f"the conversation fills the context of {context:,} tokens: the oldest {what} dropped"
