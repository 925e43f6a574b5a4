"""The application: routes of OpenAI's protocol and of the server itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edge_demo.bundle.reader import Bundle
from edge_demo.guard.decisions import Guard
from edge_demo.server.http import watchdog
from edge_demo.server.http.access import Access, AccessMiddleware
from edge_demo.server.http.body import read_json
from edge_demo.server.http.generating import GONE, Generating, refusal_of, refused
from edge_demo.server.http.guarding import Guarding
from edge_demo.server.http.metrics import metrics
from edge_demo.server.page import page
from edge_demo.server.protocol.chat import ChatForm, read_chat
from edge_demo.server.protocol.completions import CompletionForm, read_completion
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.request import Prompt
from edge_demo.server.protocol.responses import ResponseForm, read_response_request
from edge_demo.server.protocol.texts import read_apply_template, read_detokenize, read_tokenize
from edge_demo.server.protocol.vertex import Vertex, read_predict
from edge_demo.server.worker.worker import Worker
from edge_demo.text.grammar import Grammars
from edge_demo.text.tokenizer import Tokenizer

_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(
    bundle: Bundle,
    tokenizer: Tokenizer,
    worker: Worker,
    access: Access,
    most_tokens: int,
    vertex: Vertex | None = None,
    guarding: Guarding | None = None,
) -> Starlette:
    """An application that answers with a worker, which it starts and ends.

    Args:
        bundle: that answers.
        tokenizer: of it.
        worker: not started.
        access: who may ask.
        most_tokens: that an answer may have.
        vertex: routes that a container of Vertex AI has beside the others.
        guarding: judges prompts and answers; ended at the end.
    """
    generating = Generating(bundle, tokenizer, worker, most_tokens, guarding)
    guard = guarding.guard if guarding else None
    routes = _Routes(bundle, tokenizer, worker, generating, guard)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        # The table for grammars takes seconds; whoever needs it first would wait for it.
        threading.Thread(target=_prepare, args=(generating.grammars,), daemon=True).start()
        alive = asyncio.create_task(watchdog.keep_alive(worker))
        yield
        watchdog.notify("STOPPING=1")
        alive.cancel()
        await asyncio.to_thread(worker.close)
        if guarding is not None:
            await asyncio.to_thread(guarding.close)

    of_vertex = []
    if vertex is not None:
        of_vertex = [
            Route(vertex.health_route, routes.health),
            Route(vertex.predict_route, _refusing(routes.predict), methods=["POST"]),
        ]
    return Starlette(
        routes=[
            *of_vertex,
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/chat/completions", _refusing(routes.chat), methods=["POST"]),
            Route("/v1/completions", _refusing(routes.complete), methods=["POST"]),
            Route("/v1/responses", _refusing(routes.respond), methods=["POST"]),
            Route("/v1/embeddings", _refusing(routes.embed), methods=["POST"]),
            Route("/tokenize", _refusing(routes.tokenize), methods=["POST"]),
            Route("/detokenize", _refusing(routes.detokenize), methods=["POST"]),
            Route("/apply-template", _refusing(routes.apply_template), methods=["POST"]),
        ],
        middleware=[Middleware(AccessMiddleware, access=access)],
        exception_handlers={HTTPException: _no_route, Exception: _unexpected},
        lifespan=lifespan,
    )


def _prepare(grammars: Grammars) -> None:
    with contextlib.suppress(ModuleNotFoundError):  # whoever asks for one will be told
        grammars.prepare()


def _refusing(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors become answers."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refusal as refusal:
            return refused(refusal)
        except ClientDisconnect:
            return GONE

    return answer


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return refused(Refusal("this route takes another method", 405, "method_not_allowed"))
    message = "there is no such route; this server has /v1/chat/completions, /v1/completions, …"
    return refused(Refusal(message, error.status_code, "not_found"))


async def _unexpected(request: Request, error: Exception) -> Response:
    return refused(refusal_of(error))


class _Routes:
    """The endpoints."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        worker: Worker,
        generating: Generating,
        guard: Guard | None,
    ) -> None:
        self._guard = guard
        self._bundle = bundle
        self._tokenizer = tokenizer
        self._worker = worker
        self._generating = generating
        self._page, self._policy = page()

    async def page(self, request: Request) -> Response:
        """The page, which asks this server."""
        headers = {
            "content-security-policy": self._policy,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return HTMLResponse(self._page, headers=headers)

    async def health(self, request: Request) -> Response:
        """Whether requests can be answered."""
        if not self._worker.alive:
            return JSONResponse({"status": "error"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Numbers for Prometheus."""
        text = metrics(self._worker, self._generating.unknown_fields, self._guard)
        return PlainTextResponse(text, media_type=_TEXT_FORMAT)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model by its name."""
        try:
            self._generating.check_model(request.path_params["name"])
        except Refusal as refusal:
            return refused(refusal)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        bundle = self._bundle
        meta = {
            "context_length": bundle.context_length,
            "recipe": bundle.recipe,
            "vocabulary_size": bundle.vocabulary_size,
            "instruction_tuned": self._tokenizer.spec.chat is not None,
        }
        return {
            "id": bundle.name,
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "meta": meta,
        }

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation."""
        wanted = read_chat(await read_json(request), self._bundle.vocabulary_size)
        return await self._generating.answer(request, wanted, ChatForm())

    async def complete(self, request: Request) -> Response:
        """Texts that are continued."""
        wanted = read_completion(await read_json(request), self._bundle.vocabulary_size)
        return await self._generating.answer(request, wanted, CompletionForm())

    async def respond(self, request: Request) -> Response:
        """A response to a conversation that the request brings."""
        wanted = read_response_request(await read_json(request), self._bundle.vocabulary_size)
        return await self._generating.answer(request, wanted, ResponseForm())

    async def predict(self, request: Request) -> Response:
        """Predictions for instances, as Vertex AI asks for them."""
        wanted = read_predict(await read_json(request), self._bundle.vocabulary_size)
        found = await self._generating.whole(request, wanted)
        return GONE if found is None else JSONResponse({"predictions": found})

    async def embed(self, request: Request) -> Response:
        """Nothing: a bundle that generates text has no embeddings."""
        await read_json(request)
        raise Refusal(
            f"{self._bundle.name} generates text; embeddings need an embedder's bundle",
            code="unsupported",
        )

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text."""
        text, special, pieces = read_tokenize(await read_json(request))
        ids = await asyncio.to_thread(self._tokenizer.encode, text, bos=special)
        if not pieces:
            return JSONResponse({"tokens": ids})
        tokens = []
        for token in ids:
            piece = self._tokenizer.piece_bytes(token)
            try:
                shown: Any = piece.decode()
            except UnicodeDecodeError:
                shown = list(piece)
            tokens.append({"id": token, "piece": shown})
        return JSONResponse({"tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        ids = read_detokenize(await read_json(request), self._bundle.vocabulary_size)
        return JSONResponse({"content": await asyncio.to_thread(self._tokenizer.decode, ids)})

    async def apply_template(self, request: Request) -> Response:
        """The prompt that a conversation becomes, as text and as tokens."""
        system, turns = read_apply_template(await read_json(request))
        prompt = Prompt(turns=turns, system=system)
        ids, _ = await asyncio.to_thread(self._generating.encode, prompt)
        return JSONResponse({"prompt": self._tokenizer.show(ids), "tokens": ids})
