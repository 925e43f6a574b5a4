"""The application: routes of OpenAI's protocol and of the server itself."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from edge_demo.bundle.reader import Bundle
from edge_demo.guard.decisions import Guard
from edge_demo.server.http import watchdog
from edge_demo.server.http.access import Access, AccessMiddleware
from edge_demo.server.http.body import read_json
from edge_demo.server.http.generating import GONE, Generating
from edge_demo.server.http.guarding import Guarding
from edge_demo.server.http.routes import EXCEPTION_HANDLERS, BundleRoutes, refusing
from edge_demo.server.page import page
from edge_demo.server.protocol.chat import ChatForm, read_chat
from edge_demo.server.protocol.completions import CompletionForm, read_completion
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.request import Prompt
from edge_demo.server.protocol.responses import ResponseForm, read_response_request
from edge_demo.server.protocol.texts import read_apply_template
from edge_demo.server.protocol.vertex import Vertex, read_predict
from edge_demo.server.worker.worker import Worker
from edge_demo.text.grammar import Grammars
from edge_demo.text.tokenizer import Tokenizer


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
        async with watchdog.working(worker):
            # The table for grammars takes seconds; whoever needs it first would wait for it.
            threading.Thread(target=_prepare, args=(generating.grammars,), daemon=True).start()
            yield
        if guarding is not None:
            await asyncio.to_thread(guarding.close)

    of_vertex = []
    if vertex is not None:
        of_vertex = [
            Route(vertex.health_route, routes.health),
            Route(vertex.predict_route, refusing(routes.predict), methods=["POST"]),
        ]
    return Starlette(
        routes=[
            *of_vertex,
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/chat/completions", refusing(routes.chat), methods=["POST"]),
            Route("/v1/completions", refusing(routes.complete), methods=["POST"]),
            Route("/v1/responses", refusing(routes.respond), methods=["POST"]),
            Route("/v1/embeddings", refusing(routes.embed), methods=["POST"]),
            Route("/tokenize", refusing(routes.tokenize), methods=["POST"]),
            Route("/detokenize", refusing(routes.detokenize), methods=["POST"]),
            Route("/apply-template", refusing(routes.apply_template), methods=["POST"]),
        ],
        middleware=[Middleware(AccessMiddleware, access=access)],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )


def _prepare(grammars: Grammars) -> None:
    with contextlib.suppress(ModuleNotFoundError):  # whoever asks for one will be told
        grammars.prepare()


class _Routes(BundleRoutes):
    """The endpoints."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        worker: Worker,
        generating: Generating,
        guard: Guard | None,
    ) -> None:
        super().__init__(bundle, tokenizer, worker, generating, guard)
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

    async def apply_template(self, request: Request) -> Response:
        """The prompt that a conversation becomes, as text and as tokens."""
        system, turns = read_apply_template(await read_json(request))
        prompt = Prompt(turns=turns, system=system)
        ids, _ = await asyncio.to_thread(self._generating.encode, prompt)
        return JSONResponse({"prompt": self._tokenizer.show(ids), "tokens": ids})
