"""Connections that do not become requests."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from edge_demo.server.http import serving

PATIENCE_S = 0.5


@pytest.fixture
def address(monkeypatch):
    """Of a server that answers slowly and has little patience itself."""
    monkeypatch.setattr(serving, "_HEADERS_S", PATIENCE_S)

    def answer(request):
        time.sleep(3 * PATIENCE_S)
        return PlainTextResponse("late")

    sock = serving.listen("127.0.0.1", 0)
    server = uvicorn.Server(serving.config_of(Starlette(routes=[Route("/", answer)]), 1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield sock.getsockname()
    server.should_exit = True
    thread.join()


def received(address, *sent):
    """All that comes until the server closes the connection."""
    with socket.create_connection(address, timeout=20) as sock:
        for part in sent:
            sock.sendall(part)
            time.sleep(PATIENCE_S / 5)
        parts = []
        while part := sock.recv(4096):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "sent", [(), (b"GET",), (b"GET / HTTP/1.1\r\nHost:", b" a\r\n", b"X: y\r\n")]
)
def test_a_client_that_does_not_ask_is_dropped(address, sent):
    assert received(address, *sent) == b""


def test_a_slow_answer_is_waited_for(address):
    found = received(address, b"GET / HTTP/1.1\r\nHost: a\r\n", b"Connection: close\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200") and found.endswith(b"late")


def test_a_second_request_that_stops_is_dropped(address):
    whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(whole)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        sock.sendall(whole[:-2])
        while sock.recv(4096):
            pass
