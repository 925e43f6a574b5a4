"""Runs and shows the turns of `chat`, at a terminal or in a pipe."""

from __future__ import annotations

import json
import sys

from edge_demo.cli.answering import Answering
from edge_demo.cli.terminal import Progress, note, show
from edge_demo.cli.watched import ChatGuard, Unwatched, Watched
from edge_demo.device.hardware import celsius
from edge_demo.device.memory_limits import peak_rss_bytes
from edge_demo.errors import EdgeError, RequestError
from edge_demo.text.answer import Completion
from edge_demo.text.generator import CompletionStream, Generator
from edge_demo.text.session import ChatSession
from edge_demo.units import megabytes


class Talk:
    """A chat: each turn is run and shown.

    Args:
        answering: the options of the command.
        generator: that answers.
        session: of the chat.
        as_json: whether programs read the answers.
        keeps_first: whether the first message is stored in the prompt cache.
        guard: judges messages and answers.
    """

    def __init__(
        self,
        answering: Answering,
        generator: Generator,
        session: ChatSession,
        as_json: bool,
        keeps_first: bool,
        guard: ChatGuard | None = None,
    ) -> None:
        self._guard = guard
        self._answering = answering
        self._engine = generator.engine
        self._session = session
        self._json = as_json
        self._keeps_first = keeps_first

    def answer(self, message: str | None) -> bool:
        """Answer a message.

        Args:
            message: of the user; `None` answers the last one again.

        Returns:
            `False` if it was stopped and stdin is not a terminal, so that the chat ends.

        Raises:
            EdgeError: there can be no answer; at a terminal a message too long gets a note.
        """
        stream, stopped = None, False
        try:
            watched = self._watch(message)
            stream = self._begin(message)
            try:
                for piece in stream:
                    self._show(watched.push(piece.text))
            except KeyboardInterrupt:
                stopped = True
            self._show(watched.finish())
        except KeyboardInterrupt:
            stopped = True
        except RequestError as error:
            if stream is not None:
                stream.close()
                self._session.take_back()
            if not sys.stdin.isatty():
                raise
            note(f"{error}. The message was dropped" if message is not None else str(error))
            return True
        except EdgeError:
            if stream is not None and stream.completion.ids and not self._json:
                show("\n")  # what is said next begins a line
            raise
        if stream is not None:
            self._keep(stream.completion, again=message is None)
        return sys.stdin.isatty() or not stopped

    def _show(self, text: str) -> None:
        if text and not self._json:
            show(text)

    def _watch(self, message: str | None) -> Watched:
        """Have the guard judge a message; then what judges the answer.

        Raises:
            RequestError: the guard refuses the message.
        """
        if self._guard is None:
            return Unwatched()
        if message is not None:
            self._guard.admit(message)
            return self._guard.watch(message)
        asked = [text for who, text in self._session.turns if who == "user"]
        return self._guard.watch(asked[-1] if asked else "")

    def _begin(self, message: str | None) -> CompletionStream:
        progress = Progress("prompt token", vanishes=True)
        if message is None:
            return self._session.send_again(progress)
        on_held = self._save_first if self._keeps_first else None
        stream = self._session.send(message, progress, on_held)
        if self._session.dropped:
            note(self._dropped(len(stream.completion.prompt_ids)))
        return stream

    def _save_first(self, held: Completion) -> None:
        self._keeps_first = False
        self._answering.cache.save_prompt(self._engine, held)

    def _keep(self, completion: Completion, again: bool) -> None:
        """Make the answer a turn, and say how it ended."""
        kept = self._session.keep(completion)
        reason, typed = completion.finish_reason, sys.stdin.isatty()
        if self._json:
            print(json.dumps(self._answering.report(completion)), flush=True)
        else:
            show("\n")
            if not kept:
                what = "the former answer stays" if again else "the message was dropped"
            elif typed:
                what = figures(completion, self._engine.context_length)
            else:
                what = f"{len(completion.ids):,} tokens"
            note(f"[{reason}] {what}")
        if reason == "context" and typed:
            note(self._full())
        self._answering.cache.tell()

    def _dropped(self, left: int) -> str:
        count = self._session.dropped
        what = "message and its answer" if count == 1 else f"{count:,} messages and answers"
        return (
            f"the conversation has {left + self._session.dropped_tokens:,} tokens, which leaves "
            f"too little of the context of {self._engine.context_length:,} tokens for an answer; "
            f"the oldest {what} {'was' if count == 1 else 'were'} dropped, {left:,} tokens remain"
        )

    def _full(self) -> str:
        if self._session.overflow == "stop":
            then = "/clear begins a new conversation, /set overflow drop-oldest drops the oldest"
        else:
            then = "the next message drops the oldest messages"
        return (
            f"the context of {self._engine.context_length:,} tokens is full, so the answer ends "
            f"here; {then}"
        )


def figures(completion: Completion, context: int) -> str:
    """The figures of an answer, for people: time, speed, context, memory and temperature.

    Args:
        completion: the answer.
        context: how many tokens the engine can hold.
    """
    speed, degrees = completion.decode_tokens_per_s, celsius()
    used = len(completion.prompt_ids) + len(completion.ids)
    parts = [
        f"{len(completion.ids):,} tokens",
        f"first token {completion.prefill_s:.1f} s",
        f"{speed:.0f} tokens/s" if speed else "",
        f"{used:,} of {context:,} context",
        f"{completion.reused_tokens:,} cached" if completion.reused_tokens else "",
        megabytes(peak_rss_bytes()),
        f"{degrees:.0f} °C" if degrees is not None else "",
    ]
    return " · ".join(filter(None, parts))
