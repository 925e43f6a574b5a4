"""Who may ask: hosts, origins, keys and content types.

A page on the internet can make a browser send requests to this server, or give its own name this
machine's address (DNS rebinding). So `Host` must name this machine, and `Origin`, which browsers
send, must be this server's own or one that was named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_demo.server.protocol.errors import Refusal

_OPEN = ("/", "/health")  # whoever sees them learns nothing
_LONGEST_HOST = 255


@dataclasses.dataclass(frozen=True)
class Access:
    """What is allowed.

    Attributes:
        keys: of which a request must have one; none are needed where there are none.
        hosts: names of this machine, beside its addresses and `localhost`.
        origins: of pages elsewhere that may ask, such as `https://chat.example`.
        behind_gateway: whether a gateway of others, which names this machine as it likes, decides
            who may ask.
        open_paths: which need no key.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    behind_gateway: bool = False
    open_paths: tuple[str, ...] = _OPEN

    def check_host(self, header: str) -> None:
        """Refuse a name that is not this machine's.

        Raises:
            Refusal: it is another.
        """
        if self.behind_gateway:
            return
        name = host_name(header)
        if name is not None:
            if name in ("localhost", *self.hosts):
                return
            try:
                ipaddress.ip_address(name)
            except ValueError:
                pass
            else:  # a name that leads here is needed to deceive a browser, not an address
                return
        raise Refusal(
            "the Host header does not name this machine; start the server with --allow-host NAME",
            403,
            "host_not_allowed",
        )

    def check_origin(self, origin: str, host: str) -> bool:
        """Refuse a page of another server.

        Args:
            origin: of the page.
            host: the Host header.

        Returns:
            Whether it is a page elsewhere that was named.

        Raises:
            Refusal: it was not.
        """
        if origin in self.origins:
            return True
        if origin.partition("://")[2] == host and origin.startswith(("http://", "https://")):
            return False
        raise Refusal(
            "pages of other servers may not ask; start the server with --cors-origin ORIGIN",
            403,
            "origin_not_allowed",
        )

    def namespace(self, authorization: str) -> str:
        """What the requests of one key share.

        Args:
            authorization: the header, which may be empty.

        Raises:
            Refusal: a key is needed, and this is none.
        """
        if not self.keys:
            return ""
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, _digest(key)) for key in self.keys]  # all of them
        if scheme.lower() != "bearer" or not any(matches):
            message = "give an API key: Authorization: Bearer KEY"
            raise Refusal(message, 401, "invalid_api_key")
        return digest.hex()


def host_name(header: str) -> str | None:
    """The name in a `Host` header, without its port and the brackets of an IPv6 address."""
    if not header or len(header) > _LONGEST_HOST:
        return None
    try:
        parts = urlsplit(f"//{header}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return None
    return None if "@" in header or "/" in header else name


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class AccessMiddleware:
    """Refuses what `Access` does not allow, before anything of a request's body is read.

    Args:
        app: that answers the others. `scope["state"]["namespace"]` says which keys and values a
            request may use.
        access: what is allowed.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        elsewhere = False
        try:
            self._access.check_host(host)
            if origin is not None:
                elsewhere = self._access.check_origin(origin, host)
            if scope["method"] == "OPTIONS" and elsewhere:
                await _allow(headers, origin or "")(scope, receive, send)
                return
            state = scope.setdefault("state", {})
            state["namespace"] = ""
            if scope["path"] not in self._access.open_paths:
                state["namespace"] = self._access.namespace(headers.get("authorization", ""))
            if scope["method"] == "POST":
                _check_json(headers.get("content-type", ""))
        except Refusal as refusal:
            response = JSONResponse(refusal.body, refusal.status, headers={"connection": "close"})
            await response(scope, receive, _with_origin(send, origin if elsewhere else None))
            return
        await self._app(scope, receive, _with_origin(send, origin if elsewhere else None))


def _check_json(content_type: str) -> None:
    # A form of another site can send other types without being asked whether it may.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal("the Content-Type must be application/json", 415, "unsupported_media_type")


def _allow(headers: Headers, origin: str) -> Response:
    """The answer to a browser that asks whether a page may ask."""
    allowed = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "authorization, content-type",
        "access-control-max-age": "600",
        "vary": "origin",
    }
    return Response(status_code=204, headers=allowed)


def _with_origin(send: Send, origin: str | None) -> Send:
    """Lets a page elsewhere read the answer, if it was named; other headers are for all."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
            if origin is not None:
                headers["access-control-allow-origin"] = origin
                headers["vary"] = "origin"
        await send(message)

    return sending


def host_names(bound: str, named: Iterable[str]) -> tuple[str, ...]:
    """Names by which this machine may be called.

    Args:
        bound: the name or address that the server listens at.
        named: by the user.
    """
    import socket

    own = socket.gethostname().lower()
    return tuple({bound.lower(), own, f"{own}.local", *(name.lower() for name in named)})
