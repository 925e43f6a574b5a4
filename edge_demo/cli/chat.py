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
    from edge_demo.text.conversation import Conversation
    from edge_demo.text.generator import Generator
    from edge_demo.text.speculate import Drafter

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
    from edge_demo.text.conversation import Conversation

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
    system_ids = _run_system(answering, generator, arguments.system)
    note(_greeting(bundle))
    conversation = Conversation(
        generator.tokenizer, bundle.context_length, arguments.max_tokens, arguments.system
    )
    talk = _Talk(arguments, answering, generator, drafter, conversation, system_ids)
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


def _run_system(answering: Answering, generator: Generator, system: str) -> list[int]:
    """Have the engine hold what every conversation begins with; its tokens."""
    cache, engine = answering.cache, generator.engine
    ids = generator.tokenizer.encode_system(system) if system else []
    if ids:
        engine.check(ids)
    cache.load(engine)
    if ids and generator.prepare(ids) < len(ids):
        cache.save(engine)
        cache.tell()
    return ids


class _Talk:
    """The turns of a conversation: each is run and shown."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        answering: Answering,
        generator: Generator,
        drafter: Drafter | None,
        conversation: Conversation,
        system_ids: list[int],
    ) -> None:
        self._json = arguments.json
        self._max_tokens = arguments.max_tokens
        self._answering = answering
        self._generator = generator
        self._drafter = drafter
        self._conversation = conversation
        self._system_ids = system_ids
        self._keeps_first = not arguments.system  # in the prompt cache

    def obey(self, command: str) -> None:
        """Do what a command says; an unknown one gets a note."""
        from edge_demo.cli.terminal import note

        if command in ("clear", "reset"):
            self._conversation.clear()
            self._generator.prepare(self._system_ids)  # as if it had just been started
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
        from edge_demo.text.answer import Completion

        completion, stopped = None, False
        try:
            completion = Completion(self._conversation.ask(message))
            self._show(completion)
        except KeyboardInterrupt:
            stopped = True
        except RequestError as error:
            if completion is not None:
                self._conversation.take_back()
            if not sys.stdin.isatty():
                raise
            note(f"{error}. The message was dropped")
            return True
        except EdgeError:
            if completion is not None and completion.ids and not self._json:
                show("\n")  # what is said next begins a line
            raise
        if completion is not None:
            self._keep(completion)
        return sys.stdin.isatty() or not stopped

    def _show(self, completion: Completion) -> None:
        from edge_demo.cli.terminal import Progress, note, show

        engine = self._generator.engine
        if self._conversation.dropped:
            note(_dropped(self._conversation.dropped, engine.context_length))
            self._generator.prepare(self._system_ids)
        pieces = self._generator.stream(
            completion.prompt_ids,
            self._answering.sampler,
            self._max_tokens,
            completion,
            self._drafter,
            Progress("prompt token", vanishes=True),
            self._answering.stop,
            on_held=self._save_first if self._keeps_first else None,
            goes_on=True,
        )
        for piece in pieces:
            if not self._json:
                show(piece)

    def _save_first(self, held: Completion) -> None:
        self._keeps_first = False
        self._answering.cache.save_prompt(self._generator.engine, held)

    def _keep(self, completion: Completion) -> None:
        """Make the answer a turn, or, where it was stopped before its first token, forget both."""
        from edge_demo.cli.terminal import note, show

        left_out = completion.finish_reason == "interrupted" and not completion.ids
        if left_out:
            self._conversation.take_back()
        else:
            self._conversation.answer(completion.text)
        if self._json:
            print(json.dumps(self._answering.report(completion)), flush=True)
        else:
            show("\n")
            note(
                f"[{completion.finish_reason}] "
                + ("the message was dropped" if left_out else f"{len(completion.ids):,} tokens")
            )
        self._answering.cache.tell()


def _dropped(count: int, context: int) -> str:
    what = "message and its answer were" if count == 1 else f"{count:,} messages and answers were"
    return f"the conversation fills the context of {context:,} tokens: the oldest {what} dropped"
