"""Answers requests: prompts become jobs of the worker, its events become answers or streams."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import common_prefix
from edge_demo.errors import EdgeError, RequestError, sentence
from edge_demo.server.http.body import until_gone
from edge_demo.server.http.events import DONE, EventStream, event
from edge_demo.server.http.guarding import Guarding, Watch
from edge_demo.server.protocol.answer import (
    Answer,
    Choice,
    Form,
    TokenLogProbs,
    TokenText,
)
from edge_demo.server.protocol.calls import SaidSoFar
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.request import GenerateRequest, Prompt
from edge_demo.server.worker.job import Ended, Event, Failed, Job, Piece, Reading
from edge_demo.server.worker.owner import BusyError, ClosedError
from edge_demo.server.worker.worker import Worker
from edge_demo.text.grammar import Grammar, Grammars, GrammarSource
from edge_demo.text.log_probabilities import TokenLogProb
from edge_demo.text.tokenizer import Tokenizer
from edge_demo.unexpected import unexpected

_MOST_PENDING = 4096  # events that a client has not read
_RETRY_S = 2
GONE = Response(status_code=499)  # nobody reads it; nginx's number


class Generating:
    """Answers prompts with a worker.

    Args:
        bundle: that answers.
        tokenizer: of it.
        worker: started.
        most_tokens: that an answer may have, whatever a request asks for.
        guarding: judges prompts and answers.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        worker: Worker,
        most_tokens: int,
        guarding: Guarding | None = None,
    ) -> None:
        self.grammars = Grammars(tokenizer, bundle.vocabulary_size)
        self._bundle = bundle
        self._tokenizer = tokenizer
        self._worker = worker
        self._most_tokens = most_tokens
        self._guarding = guarding
        self.unknown_fields = 0

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not here.

        Raises:
            Refusal: the request is for another.
        """
        if name is not None and name != self._bundle.name:
            raise Refusal.of_model(name, self._bundle.name)

    def encode(self, prompt: Prompt) -> tuple[list[int], int]:
        """The tokens of a prompt, and how many of the first other prompts may begin with too.

        Raises:
            Refusal: the model takes no conversations.
        """
        if prompt.ids:
            return list(prompt.ids), 0
        if not prompt.turns:
            return self._tokenizer.encode(prompt.text), 0
        if self._tokenizer.spec.chat is None:
            raise Refusal(
                f"{self._bundle.name} is a base model without a turn template; ask /v1/completions",
                code="no_chat_template",
            )
        ids = self._tokenizer.encode_chat(prompt.turns, prompt.system)
        shared = self._tokenizer.encode_system(prompt.system) if prompt.system else []
        return ids, len(shared)

    def _next_beginning(self, prompt: Prompt) -> Callable[[str], list[int]] | None:
        """What a conversation's next prompt begins with, given the answer: all before its text."""
        if not prompt.turns:
            return None

        def beginning(answer: str) -> list[int]:
            two = (
                self._tokenizer.encode_chat(
                    [*prompt.turns, ("model", answer), ("user", text)], prompt.system
                )
                for text in ("a", "b")
            )
            one, other = two
            return one[: common_prefix(one, other)]

        return beginning

    def _compile(self, source: GrammarSource | None, count: int, field: str) -> list[Grammar]:
        """One for each choice, none where there is no source; `field` has asked for it."""
        if source is None:
            return []
        try:
            return [self.grammars.compile(source) for _ in range(count)]
        except ModuleNotFoundError:
            raise Refusal(
                f"{field} needs gemma-keras[grammar], which is not installed on this server",
                code="unsupported",
                param=field,
            ) from None
        except RequestError as error:
            raise Refusal(f"{field}: {error}", code="invalid_grammar", param=field) from None

    async def answer(self, request: Request, wanted: GenerateRequest, form: Form) -> Response:
        """Answer a request, whole or as a stream.

        Raises:
            Refusal: the request cannot be answered.
        """
        if wanted.stream:
            run = await self._begin(wanted, request)
            return EventStream(run.stream(form, wanted.usage))
        whole = await self.whole(request, [(wanted, form)])
        return GONE if whole is None else JSONResponse(whole[0])

    async def whole(
        self, request: Request, wanted: Sequence[tuple[GenerateRequest, Form]]
    ) -> list[dict[str, Any]] | None:
        """Answer several requests that came as one; `None` where the client has gone.

        Raises:
            Refusal: one cannot be answered.
        """
        runs: list[_Run] = []
        tasks: list[asyncio.Future[Any]] = []
        try:
            for one, _ in wanted:
                runs.append(await self._begin(one, request))
            tasks = [asyncio.ensure_future(run.collect()) for run in runs]
            ended = asyncio.gather(*tasks)
            gone = asyncio.ensure_future(until_gone(request))
            tasks += [ended, gone]
            await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                return None
            answers = ended.result()
            return [form.whole(a) for (_, form), a in zip(wanted, answers, strict=True)]
        finally:
            for task in tasks:
                task.cancel()
            for run in runs:
                run.cancel()

    async def _begin(self, wanted: GenerateRequest, request: Request) -> _Run:
        self.check_model(wanted.model)
        self.unknown_fields += wanted.unknown
        namespace = request.scope["state"]["namespace"]
        encoded = await asyncio.to_thread(
            lambda: [(*self.encode(p), self._next_beginning(p)) for p in wanted.prompts]
        )
        answer = Answer(
            id=secrets.token_hex(12),
            created=int(time.time()),
            model=self._bundle.name,
            fingerprint=f"fp_{self._bundle.fingerprint[:12]}",
        )
        if self._guarding is not None:
            await self._guarding.admit(answer.id, wanted.prompts, namespace)
        names = [tool.name for tool in wanted.offer.allowed] if wanted.offer else []
        run = _Run(answer, wanted.settings.top is not None, self._worker, self._tokenizer, names)
        settings, context = wanted.settings, self._bundle.context_length
        count = len(encoded) * settings.choices
        field = "tools" if wanted.offer else "response_format"
        grammars = await asyncio.to_thread(self._compile, settings.grammar, count, field)
        for ids, shared, next_beginning in encoded:
            room = context - len(ids) + 1  # the last token need not be held
            length = min(settings.max_tokens or room, max(room, 1), self._most_tokens)
            for choice in range(settings.choices):
                job = Job(
                    ids=ids,
                    sampler=settings.sampler(choice),
                    max_tokens=length,
                    tell=run.teller(len(answer.choices)),
                    stop=settings.stop,
                    bias=settings.bias,
                    grammar=grammars.pop() if grammars else None,
                    top=settings.top,
                    namespace=namespace,
                    shared=shared,
                    next_beginning=next_beginning,
                )
                answer.choices.append(Choice(len(answer.choices)))
                run.jobs.append(job)
        if self._guarding is not None:
            of_each = [p for p in wanted.prompts for _ in range(settings.choices)]
            run.watch = self._guarding.watch(answer.id, of_each, namespace, wanted.stream)
        try:
            self._worker.submit(*run.jobs)
        except BusyError:
            raise Refusal(
                "too many requests are waiting; try again later", 429, "server_busy"
            ) from None
        except ClosedError:
            raise Refusal("the server is shutting down", 503, "shutting_down") from None
        except RequestError as error:
            code = "context_length_exceeded" if "context" in str(error) else None
            raise Refusal(str(error), code=code) from None
        return run


class _Run:
    """Jobs of one request, whose events the event loop gets."""

    def __init__(
        self,
        answer: Answer,
        logprobs: bool,
        worker: Worker,
        tokenizer: Tokenizer,
        tool_names: Sequence[str],
    ) -> None:
        self.answer = answer
        self.jobs: list[Job] = []
        self.watch: Watch | None = None
        self._logprobs = logprobs
        self._tool_names = tool_names
        self._said: dict[int, SaidSoFar] = {}
        self._worker = worker
        self._tokenizer = tokenizer
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def teller(self, index: int) -> Callable[[Event], None]:
        """What the worker's thread calls with the events of one choice."""

        def tell(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._put, index, event)
            except RuntimeError:  # the loop has ended
                self.jobs[index].cancelled = True

        return tell

    def _put(self, index: int, event: Event) -> None:
        if self._events.qsize() == _MOST_PENDING:
            self.cancel()
            event = Failed(Refusal("the answer was read too slowly", 408, "slow_reader"))
        if self._events.qsize() <= _MOST_PENDING:
            self._events.put_nowait((index, event))

    def cancel(self) -> None:
        """Give all jobs up that have not ended."""
        self._worker.cancel(*self.jobs)

    async def _next(self) -> list[tuple[int, Event]]:
        """The events that wait, as far as they may be shown; there may be none yet."""
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        if self.watch is None:
            return found
        try:
            return await self.watch.passed(found)
        except Exception as error:  # such as onnxruntime's: nothing unjudged is shown
            return [(found[0][0], Failed(error))]

    async def collect(self) -> Answer:
        """The whole answer.

        Raises:
            Refusal: one of the choices failed.
        """
        waiting = len(self.jobs)
        while waiting:
            for index, happened in await self._next():
                if isinstance(happened, Failed):
                    raise refusal_of(happened.error)
                if isinstance(happened, Piece):
                    self._of(index).add(happened.text)
                    self._add_logprob(self.answer.choices[index], happened.logprob)
                elif isinstance(happened, Ended):
                    waiting -= 1
                    self._end(index, happened.cut)
        for choice in self.answer.choices:
            self._of(choice.index).fill(choice)
            if self._logprobs and choice.logprobs is None:
                choice.logprobs = []
        return self.answer

    async def stream(self, form: Form, usage: bool) -> AsyncGenerator[bytes, None]:
        """The answer as events, those that wait together in one part."""
        begun: set[int] = set()
        waiting = len(self.jobs)
        try:
            while waiting:
                shown: list[dict[str, Any]] = []
                for index, happened in await self._next():
                    if isinstance(happened, Reading):
                        continue
                    if isinstance(happened, Failed):
                        shown += form.fail(self.answer, refusal_of(happened.error))
                        yield _events(shown, form.named)
                        return
                    if index not in begun:
                        begun.add(index)
                        shown += form.begin(self.answer, index)
                    if isinstance(happened, Piece):
                        choice = self._of(index).add(happened.text)
                        self._add_logprob(choice, happened.logprob)
                        shown += form.piece(self.answer, choice)
                    else:
                        waiting -= 1
                        shown += form.piece(self.answer, self._of(index).finish())
                        self._end(index, happened.cut)
                        shown += form.end(self.answer, index)
                if waiting:
                    if shown:
                        yield _events(shown, form.named)
                    continue
                shown += form.close(self.answer, usage)
                yield _events(shown, form.named) + (b"" if form.named else DONE)
        finally:
            self.cancel()

    def _of(self, index: int) -> SaidSoFar:
        """What a choice has said."""
        return self._said.setdefault(index, SaidSoFar(index, self._tool_names))

    def _end(self, index: int, cut: str | None) -> None:
        """Count what a job that has ended took, or that is given up where it was cut."""
        job, answer = self.jobs[index], self.answer
        done = job.completion
        whole = "tool_calls" if self._of(index).calls else "stop"
        reason = whole if done.finish_reason == "stop" else "length"
        answer.choices[index].finish_reason = cut or reason
        if cut:
            self._worker.cancel(job)
        answer.completion_tokens += len(done.ids)
        prompts = {id(j.ids): j for j in reversed(self.jobs)}.values()  # the first of each
        answer.prompt_tokens = sum(len(j.ids) for j in prompts)
        answer.cached_tokens = sum(j.completion.reused_tokens for j in prompts)
        answer.prompt_s = max(answer.prompt_s, done.prefill_s)
        answer.predicted_s = max(answer.predicted_s, done.decode_s)

    def _add_logprob(self, choice: Choice, found: TokenLogProb | None) -> None:
        if found is None:
            return
        token, *top = (
            TokenText(self._tokenizer.piece_bytes(token), logprob)
            for token, logprob in ((found.id, found.logprob), *found.top)
        )
        choice.logprobs = choice.logprobs or []
        choice.logprobs.append(TokenLogProbs(token, tuple(top)))


def _events(shown: list[dict[str, Any]], named: bool) -> bytes:
    return b"".join(event(value, value["type"] if named else None) for value in shown)


def refusal_of(error: Exception) -> Refusal:
    """The refusal that a client gets for an error; an unexpected one is logged."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestError):
        return Refusal(str(error))
    if isinstance(error, EdgeError):
        return Refusal(sentence(error), 500, "server_error")
    if isinstance(error, MemoryError):
        return Refusal("this request needs more memory than is free", 400, "out_of_memory")
    logging.getLogger(__name__).error("edge-demo: %s", unexpected(error))
    return Refusal("something unexpected went wrong; the server's log says more", 500)


def refused(refusal: Refusal) -> JSONResponse:
    """A refusal as an answer."""
    headers = {}
    if refusal.status in (429, 503):
        headers["retry-after"] = str(_RETRY_S)
    elif refusal.status >= 500:
        headers["x-should-retry"] = "false"
    if refusal.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(refusal.body, refusal.status, headers=headers)
