"""Servers that run in a process of their own, as users start them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest


class Server:
    """A running `edge-demo serve`.

    Attributes:
        url: where it listens.
        model: the bundle's name.
        process: that runs it.
    """

    def __init__(self, process: subprocess.Popen, told: dict, log: Path) -> None:
        self.process = process
        self.url = told["url"]
        self.model = told["model"]
        self._log = log
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return self._log.read_text()

    def metric(self, name: str) -> int:
        """One number of `/metrics`."""
        lines = self.http.get("/metrics").text.splitlines()
        return int(next(line for line in lines if line.startswith(f"edge_demo_{name} ")).split()[1])

    def ask(self, message: str, **more) -> httpx.Response:
        """One message to `/v1/chat/completions`."""
        messages = [{"role": "user", "content": message}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **more})

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(folder: Path, bundle: Path, *options: str, **env: str) -> Iterator[Server]:
    """A server for a bundle, at any port."""
    command = [sys.executable, "-m", "edge_demo", "serve", str(bundle), "--port", "0", "--json"]
    log = folder / "serve.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | env,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        server = Server(process, json.loads(line), log)
        with server.http:
            yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def tiny_server(tiny_bundles, tmp_path_factory) -> Iterator[Server]:
    """A server for a small random model that knows turns."""
    with serving(tmp_path_factory.mktemp("serve"), tiny_bundles / "chat") as server:
        yield server


@pytest.fixture(scope="module")
def real_server(sample_chat_bundle, tmp_path_factory) -> Iterator[Server]:
    """A server for the real Gemma 3 270M that was taught to answer."""
    with serving(tmp_path_factory.mktemp("serve"), sample_chat_bundle) as server:
        yield server
