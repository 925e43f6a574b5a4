"""What servers of all kinds of bundles have: routes about the bundle, and errors as answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from edge_demo.bundle.reader import Bundle
from edge_demo.guard.decisions import Guard
from edge_demo.server.http.body import read_json
from edge_demo.server.http.generating import GONE, refusal_of, refused
from edge_demo.server.http.metrics import metrics
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.texts import read_detokenize, read_tokenize
from edge_demo.server.worker.embedding_worker import EmbeddingWorker
from edge_demo.server.worker.worker import Worker
from edge_demo.text.tokenizer import Tokenizer

_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"

Endpoint = Callable[[Request], Awaitable[Response]]


def refusing(endpoint: Endpoint) -> Endpoint:
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


EXCEPTION_HANDLERS = {HTTPException: _no_route, Exception: _unexpected}


class Models(Protocol):
    """What answers requests for models."""

    unknown_fields: int

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not here."""
        ...


class BundleRoutes:
    """The endpoints about a bundle.

    Args:
        bundle: that answers.
        tokenizer: of it.
        worker: that runs it.
        models: knows the models that can be asked for.
        guard: whose decisions are counted.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        worker: Worker | EmbeddingWorker,
        models: Models,
        guard: Guard | None = None,
    ) -> None:
        self._bundle = bundle
        self._tokenizer = tokenizer
        self._worker = worker
        self._models = models
        self._guard = guard

    async def health(self, request: Request) -> Response:
        """Whether requests can be answered."""
        if not self._worker.alive:
            return JSONResponse({"status": "error"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Numbers for Prometheus."""
        text = metrics(self._worker, self._models.unknown_fields, self._guard)
        return PlainTextResponse(text, media_type=_TEXT_FORMAT)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """One model by its name."""
        try:
            self._models.check_model(request.path_params["name"])
        except Refusal as refusal:
            return refused(refusal)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        bundle = self._bundle
        meta: dict[str, Any] = {
            "context_length": bundle.context_length,
            "recipe": bundle.recipe,
            "vocabulary_size": bundle.vocabulary_size,
            "instruction_tuned": self._tokenizer.spec.chat is not None,
        }
        if bundle.embedder is not None:
            meta["dimensions"] = bundle.embedder.dimensions
            meta["prompts"] = sorted(bundle.embedder.prompts)
        return {
            "id": bundle.name,
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "meta": meta,
        }

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
