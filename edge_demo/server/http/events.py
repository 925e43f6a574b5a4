"""Streams server-sent events, and notices clients that leave or do not read.

HTML Living Standard, "Server-sent events": a line that begins with a colon is a comment.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_QUIET_S = 10.0  # without an event, until a sign of life is sent
_PATIENCE_S = 30.0  # for a client that reads nothing
_SIGN_OF_LIFE = b": working\n\n"
DONE = b"data: [DONE]\n\n"


def event(value: Any, name: str | None = None) -> bytes:
    """One event with a JSON value."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data}\n\n".encode()


class EventStream(Response):
    """An answer of which parts are sent as they come.

    Args:
        parts: bytes of whole events; closed at the end, whatever happens.
    """

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the parts until they end or the client has gone."""

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        gone = asyncio.ensure_future(until_gone())
        coming: asyncio.Future[bytes] | None = None
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            while not gone.done():
                coming = coming or asyncio.ensure_future(_next(self._parts))
                await asyncio.wait(
                    {coming, gone}, timeout=_QUIET_S, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done():
                    break
                part = _SIGN_OF_LIFE
                if coming.done():
                    part, coming = coming.result(), None
                if not part:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    return
                await _within(
                    lambda part=part: send(
                        {"type": "http.response.body", "body": part, "more_body": True}
                    )
                )
        except (TimeoutError, OSError):
            pass  # it does not read, or has gone
        finally:
            gone.cancel()
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            await self._parts.aclose()


async def _within(send: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        await send()


async def _next(parts: AsyncGenerator[bytes, None]) -> bytes:
    """The next part, and nothing at the end."""
    return await anext(parts, b"")
