"""The application of an embedder's bundle: `/v1/embeddings`, and routes about the bundle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.embedder import Embedder
from edge_demo.errors import EdgeError, RequestError, TooLittleMemoryError, sentence
from edge_demo.server.http import watchdog
from edge_demo.server.http.access import Access, AccessMiddleware
from edge_demo.server.http.body import read_json, until_gone
from edge_demo.server.http.generating import GONE, refusal_of
from edge_demo.server.http.routes import EXCEPTION_HANDLERS, BundleRoutes, refusing
from edge_demo.server.protocol.embeddings import (
    MOST_TOKENS,
    EmbeddingsRequest,
    embeddings_body,
    read_embeddings,
)
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.worker.embedding_worker import EmbeddingJob, EmbeddingWorker
from edge_demo.server.worker.owner import BusyError, ClosedError
from edge_demo.text.embedding import EmbeddingTokens, check_dimensions, cut
from edge_demo.text.tokenizer import Tokenizer

_OF_GENERATORS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/apply-template")


def make_embedder_app(
    embedder: Embedder, tokenizer: Tokenizer, worker: EmbeddingWorker, access: Access
) -> Starlette:
    """An application that answers with a worker, which it starts and ends.

    Args:
        embedder: that answers.
        tokenizer: of its bundle.
        worker: not started.
        access: who may ask.
    """
    bundle = embedder.bundle
    embedding = Embedding(embedder, tokenizer, worker)
    routes = BundleRoutes(bundle, tokenizer, worker, embedding)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with watchdog.working(worker):
            yield

    async def generate(request: Request) -> Response:
        await read_json(request)
        raise Refusal(
            f"{bundle.name} embeds texts and generates none; ask /v1/embeddings",
            code="unsupported",
        )

    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/embeddings", refusing(embedding.answer), methods=["POST"]),
            Route("/tokenize", refusing(routes.tokenize), methods=["POST"]),
            Route("/detokenize", refusing(routes.detokenize), methods=["POST"]),
            *(Route(path, refusing(generate), methods=["POST"]) for path in _OF_GENERATORS),
        ],
        middleware=[Middleware(AccessMiddleware, access=access)],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )


class Embedding:
    """Answers requests for vectors with a worker.

    Args:
        embedder: that answers.
        tokenizer: of its bundle.
        worker: started.
    """

    def __init__(self, embedder: Embedder, tokenizer: Tokenizer, worker: EmbeddingWorker) -> None:
        self._bundle: Bundle = embedder.bundle
        self._spec = embedder.spec
        self._tokens = EmbeddingTokens(embedder.spec, tokenizer, embedder.longest)
        self._worker = worker
        self.unknown_fields = 0

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not here.

        Raises:
            Refusal: the request is for another.
        """
        if name is not None and name != self._bundle.name:
            raise Refusal.of_model(name, self._bundle.name)

    async def answer(self, request: Request) -> Response:
        """The vectors of a request's texts.

        Raises:
            Refusal: the request cannot be answered.
        """
        wanted = read_embeddings(await read_json(request), self._bundle.vocabulary_size)
        self.check_model(wanted.model)
        self.unknown_fields += wanted.unknown
        try:
            check_dimensions(self._spec, wanted.dimensions)
        except RequestError as error:
            raise Refusal(str(error), param="dimensions") from None
        rows = await asyncio.to_thread(self.rows, wanted)
        vectors = await self._vectors(request, rows)
        if vectors is None:
            return GONE

        def response() -> Response:  # of millions of numbers, while other requests go on
            shown = cut(vectors, wanted.dimensions)
            count = sum(map(len, rows))
            return JSONResponse(embeddings_body(self._bundle.name, shown, count, wanted.as_base64))

        return await asyncio.to_thread(response)

    def rows(self, wanted: EmbeddingsRequest) -> list[list[int]]:
        """The tokens of each text.

        Raises:
            Refusal: there is no such prompt, or there are too many tokens.
        """
        try:
            self._tokens.prompt(wanted.prompt_name)
        except RequestError as error:
            raise Refusal(str(error), param="prompt_name") from None
        try:
            if wanted.ids:
                rows = self._tokens.of_ids(wanted.ids, wanted.truncate)
            else:
                rows = self._tokens.of_texts(wanted.texts, wanted.prompt_name, wanted.truncate)
        except RequestError as error:
            raise Refusal(str(error), code="context_length_exceeded", param="input") from None
        count = sum(map(len, rows))
        if count > MOST_TOKENS:
            raise Refusal(
                f"input has {count:,} tokens in all; the limit is {MOST_TOKENS:,}", param="input"
            )
        return rows

    async def _vectors(self, request: Request, rows: list[list[int]]) -> np.ndarray | None:
        """The vectors of rows; `None` where the client has gone.

        Raises:
            Refusal: too many wait already, or it went wrong.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[np.ndarray | Exception] = loop.create_future()

        def put(result: np.ndarray | Exception) -> None:
            if not found.done():
                found.set_result(result)

        def tell(result: np.ndarray | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(put, result)

        job = EmbeddingJob(rows, tell)
        self._submit(job)
        gone = asyncio.ensure_future(until_gone(request))
        try:
            await asyncio.wait({gone, found}, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                return None
            result = found.result()
        finally:
            gone.cancel()
            self._worker.cancel(job)
        if isinstance(result, Exception):
            raise refusal_of(result)
        return result

    def _submit(self, job: EmbeddingJob) -> None:
        try:
            self._worker.submit(job)
        except BusyError:
            raise Refusal(
                "too many requests are waiting; try again later", 429, "server_busy"
            ) from None
        except ClosedError:
            raise Refusal("the server is shutting down", 503, "shutting_down") from None
        except TooLittleMemoryError as error:
            raise Refusal(sentence(error), code="out_of_memory", param="input") from None
        except EdgeError as error:
            raise refusal_of(error) from None
