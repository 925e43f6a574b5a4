"""Servers side by side: tokens a second and the time to the first token of 1, 4 and 16 clients.

    python benchmarks/serving.py build/sample-chat-int8 --gguf build/sample-chat.q8_0.gguf \\
        --peer-python llama-env/bin/python

Each server runs in a process of its own, alone with its clients, and they take turns. Each client
asks for a fixed number of tokens after a prompt of its own, streams the answer, and asks again. So
all servers compute the same numbers of tokens. The peer is llama-cpp-python's server; `--gguf` is
the same weights for it. Medians of the rounds are printed, and ratios to the peer.

`--alone` also prints what `edge-demo bench` gives, for the cost of the server at one client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

_WORDS = ["river", "stone", "garden", "window", "letter", "morning", "winter", "market", "lamp"]
_NO_END = {"1": -100, "106": -100}  # the tokens that end an answer of Gemma 3
_START_S = 120


class Server(NamedTuple):
    """One contender.

    Attributes:
        name: for people.
        command: that starts it; `{port}` stands for the port.
    """

    name: str
    command: list[str]


class Found(NamedTuple):
    """What a round measured.

    Attributes:
        tokens_per_s: of all clients together.
        first_s: seconds to the first token of each request.
        peak: resident memory in bytes.
    """

    tokens_per_s: float
    first_s: list[float]
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same weights for the peer")
    parser.add_argument("--peer-python", default=sys.executable, help="that has llama_cpp.server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--parallel", type=int, default=4, help="of edge-demo serve")
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--prompt", type=int, default=100, help="words of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="run edge-demo bench too")
    arguments = parser.parse_args()
    servers = list(contenders(arguments))
    print(f"{processor()}, {arguments.threads} threads\n")
    found: dict[tuple[str, int], list[Found]] = {}
    for _ in range(arguments.rounds):
        for clients in arguments.clients:
            for server in servers:
                with running(server) as (url, process):
                    asyncio.run(ask(url, 1, 1, 8, 8, seed=0))  # the first one loads
                    begin = time.perf_counter()
                    first = asyncio.run(
                        ask(url, clients, arguments.requests, arguments.prompt, arguments.new)
                    )
                    seconds = time.perf_counter() - begin
                    tokens = clients * arguments.requests * arguments.new
                    peak = memory_peak(process.pid)
                found.setdefault((server.name, clients), []).append(
                    Found(tokens / seconds, first, peak)
                )
                print(f"{server.name}, {clients}: {tokens / seconds:.1f}", file=sys.stderr)
    print("\n".join(table(servers, arguments.clients, found)))
    if arguments.alone:
        command = [sys.executable, "-m", "edge_demo", "bench", str(arguments.bundle), "--json"]
        command += ["--threads", str(arguments.threads)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"\nedge-demo bench: {out.splitlines()[-1]}")


def contenders(arguments: argparse.Namespace) -> Iterator[Server]:
    """Ours, and the peer if its weights are given."""
    threads = str(arguments.threads)
    ours = [sys.executable, "-m", "edge_demo", "serve", str(arguments.bundle), "--port", "{port}"]
    queue = str(max(arguments.clients))
    ours += ["--threads", threads, "--parallel", str(arguments.parallel), "--queue", queue]
    yield Server("edge-demo serve", ours)
    if arguments.gguf is not None:
        peer = [arguments.peer_python, "-m", "llama_cpp.server", "--model", str(arguments.gguf)]
        peer += ["--port", "{port}", "--n_threads", threads, "--n_threads_batch", threads]
        yield Server("llama-cpp-python", [*peer, "--n_ctx", "2048", "--flash_attn", "true"])


@contextlib.contextmanager
def running(server: Server) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server that answers, and its process."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [part.format(port=port) for part in server.command]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        end = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/models", trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{server.name} does not start: {' '.join(command)}")
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


async def ask(
    url: str, clients: int, requests: int, words: int, new: int, seed: int = 1
) -> list[float]:
    """Stream answers to some clients at once; the seconds to the first token of each."""
    first: list[float] = []

    async def one(client: httpx.AsyncClient, number: int) -> None:
        for request in range(requests):
            start = seed * 7919 + number * 104729 + request * 1299709
            text = " ".join(_WORDS[(start * (i + 3) // 7) % len(_WORDS)] for i in range(words))
            body = {
                "messages": [{"role": "user", "content": f"{start} {text}"}],
                "max_tokens": new,
                "temperature": 0,
                "stream": True,
                "logit_bias": _NO_END,
            }
            begin, told = time.perf_counter(), 0.0
            async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if not told and line.startswith("data: {") and _has_text(line):
                        told = time.perf_counter() - begin
            first.append(told)

    async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
        await asyncio.gather(*(one(client, number) for number in range(clients)))
    return first


def _has_text(line: str) -> bool:
    choices: list[Any] = json.loads(line.removeprefix("data: "))["choices"]
    return any(choice["delta"].get("content") for choice in choices)


def memory_peak(pid: int) -> int:
    """The most memory that a process has had resident, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) * 1024


def table(
    servers: list[Server], clients: list[int], found: dict[tuple[str, int], list[Found]]
) -> Iterator[str]:
    """Markdown; ratios above 1 of tokens a second are in favour of the row's server."""
    yield "| clients | server | tokens/s | first token, s: 50 % | 95 % | peak, MB | ratio |"
    yield "|--:|---|--:|--:|--:|--:|--:|"
    for count in clients:
        speeds = {
            s.name: statistics.median(f.tokens_per_s for f in found[s.name, count]) for s in servers
        }
        for server in servers:
            rounds = found[server.name, count]
            first = sorted(second for one in rounds for second in one.first_s)
            peak = statistics.median(one.peak for one in rounds) / 1e6
            others = [speed for name, speed in speeds.items() if name != server.name]
            ratio = f"{speeds[server.name] / others[0]:.2f}" if others else ""
            yield (
                f"| {count} | {server.name} | {speeds[server.name]:.1f} | "
                f"{first[len(first) // 2]:.2f} | {first[int(0.95 * (len(first) - 1))]:.2f} | "
                f"{peak:,.0f} | {ratio} |"
            )


def processor() -> str:
    """Its name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return f"an unknown processor of {os.cpu_count()} threads"


if __name__ == "__main__":
    main()
