"""`edge-demo chat`: a conversation at a terminal, or a message from a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_demo.cli import guard_options, options
from edge_demo.errors import INTERRUPTED, RequestError

if TYPE_CHECKING:
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.answering import Answering
    from edge_demo.cli.watched import ChatGuard
    from edge_demo.text.generator import Generator

TEXT = "Chat with a model, or continue text in turns with a base model."


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
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="neither read nor write the file of what was typed in earlier chats",
    )
    options.add_engine(parser)
    options.add_sampling(parser, options.Sampling(512, 1.0, 64, 0.95))
    guard_options.add_guard(parser)
    options.add_prompt_cache(parser, "the --system text, or of the first message without one,")


def run(arguments: argparse.Namespace) -> int:
    """Talk in turns."""
    from edge_demo.cli.answering import Answering
    from edge_demo.cli.chat_commands import ENDS, ChatCommands
    from edge_demo.cli.talk import Talk
    from edge_demo.cli.terminal import note
    from edge_demo.cli.typed_text import Command, meaning
    from edge_demo.text.session import ChatSession

    if arguments.prompt is not None and not arguments.prompt.strip():
        raise RequestError("--prompt is empty; give a message, or remove --prompt")
    guard_options.check_guard(arguments)
    answering = Answering(arguments)
    messages = _messages(arguments.prompt, not arguments.no_history)
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
    keeps_first = not arguments.system  # in the prompt cache
    guard = _guard(arguments)
    talk = Talk(answering, generator, session, arguments.json, keeps_first, guard)
    commands = ChatCommands(bundle, generator, session, talk)
    for number, message in enumerate(messages):
        typed = sys.stdin.isatty() and (number > 0 or arguments.prompt is None)
        said = meaning(message) if typed else message
        goes_on = True
        try:
            if not isinstance(said, Command):
                goes_on = not said.strip() or talk.answer(said)
            elif said.name in ENDS:
                break
            else:
                commands.obey(said)
        except KeyboardInterrupt:  # another one, while the first was told
            goes_on = sys.stdin.isatty()
            print(file=sys.stderr)
        if not goes_on:
            return INTERRUPTED
    return 0


def _guard(arguments: argparse.Namespace) -> ChatGuard | None:
    if arguments.guard is None:
        return None
    from edge_demo.bundle.reader import Bundle
    from edge_demo.cli.watched import ChatGuard

    guard = guard_options.open_guard(arguments, Bundle.open(arguments.guard))
    return ChatGuard(guard, arguments.guard_on, arguments.guard_every)


def _greeting(bundle: Bundle) -> str:
    kind = (
        "instruction-tuned: it answers in its turn template."
        if bundle.tokenizer.chat is not None
        else "a base model: it continues your text and is not tuned to answer."
    )
    keys = " Ctrl-C stops an answer, Ctrl-D ends, /help shows more." if sys.stdin.isatty() else ""
    return f"{bundle.name} ({bundle.recipe}), {kind}{keys}"


def _messages(first: str | None, keeps_history: bool) -> Iterator[str]:
    """The user's messages, as they come; none is empty."""
    from edge_demo.cli.history import TypedHistory
    from edge_demo.cli.typed import Keyboard, piped_messages

    if first is not None:
        yield first
    if sys.stdin.isatty():
        keyboard = Keyboard(TypedHistory(keeps_history))
        while (message := keyboard.read()) is not None:
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


def _run_system(answering: Answering, generator: Generator, ids: list[int]) -> None:
    """Have the engine hold the tokens that every conversation begins with."""
    cache, engine = answering.cache, generator.engine
    if ids:
        engine.check(ids)
    cache.load(engine)
    if ids and generator.prepare(ids) < len(ids):
        cache.save(engine)
        cache.tell()
