"""Reads the JSON of a request, of bounded size and in bounded time."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from edge_demo.server.protocol.errors import Refusal

MOST_BYTES = 4 << 20
_DISCARDED = 64 << 20  # bytes that are read of what is too large, and thrown away
_PATIENCE_S = 30.0


async def read_json(request: Request, most_bytes: int = MOST_BYTES) -> Any:
    """The value that a request carries.

    Args:
        request: whose body has not been read.
        most_bytes: of the body.

    Raises:
        Refusal: it is too large, comes too slowly, or is not JSON.
        ClientDisconnect: the client has gone.
    """
    try:
        async with asyncio.timeout(_PATIENCE_S):
            body = await _bytes(request, most_bytes)
    except TimeoutError:
        raise Refusal(
            f"the request did not arrive within {_PATIENCE_S:g} s", 408, "request_timeout"
        ) from None
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Refusal(f"the request is not JSON: {_reason(error)}", code="invalid_json") from None


async def _bytes(request: Request, most_bytes: int) -> bytes:
    too_large = Refusal(
        f"the request is larger than {most_bytes:,} bytes", 413, "request_too_large"
    )
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > most_bytes + _DISCARDED:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:  # a client that still sends would not read why it is refused
            parts.clear()
            if size > most_bytes + _DISCARDED:
                break
        else:
            parts.append(part)
    if size > most_bytes:
        raise too_large
    return b"".join(parts)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos:,}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:80]


async def until_gone(request: Request) -> None:
    """Return when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


__all__ = ["ClientDisconnect", "read_json", "until_gone"]
