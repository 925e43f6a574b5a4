"""Many clients that behave badly, for minutes: the server must neither fall nor grow.

    python benchmarks/soak.py build/sample-chat-int8 --plot docs/images/soak.svg

Fifty clients ask at once. Each takes its next behaviour by chance: it reads a stream to its end,
leaves in the middle of one, waits for a whole answer, sends what is no JSON or too large, reads
slowly, or asks with a seed whose answer is known. Resident memory is noted each second. At the end
nothing may be left in the server: no row, no waiting prompt. The exit status is 1 where a promise
was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from serving import Server, processor, running

_SEEDED = {
    "messages": [{"role": "user", "content": "Name three rivers."}],
    "seed": 11,
    "max_tokens": 24,
}
_BEHAVIOURS = {
    "reads a stream": 6,
    "leaves a stream": 4,
    "waits for the whole": 4,
    "sends no JSON": 1,
    "sends too much": 1,
    "reads slowly": 1,
    "asks with a seed": 3,
}


class Soak:
    """Clients of one server.

    Args:
        url: of the server.
        seed: of what they do.
        expected: text of the answer to the seeded request.
    """

    def __init__(self, url: str, seed: int, expected: str) -> None:
        self._url = url
        self._random = random.Random(seed)
        self._expected = expected
        self.found: collections.Counter[str] = collections.Counter()
        self.broken: list[str] = []

    async def client(self, http: httpx.AsyncClient, end: float) -> None:
        """Ask until the time is over."""
        while time.monotonic() < end:
            names, weights = zip(*_BEHAVIOURS.items(), strict=True)
            behaviour = self._random.choices(names, weights)[0]
            try:
                status = await self._behave(http, behaviour)
            except httpx.HTTPError as error:
                self.broken.append(f"{behaviour}: {error!r}")
                continue
            self.found[f"{behaviour}: {status}"] += 1
            if status == 429:
                await asyncio.sleep(self._random.random())

    async def _behave(self, http: httpx.AsyncClient, behaviour: str) -> Any:
        path = f"{self._url}/chat/completions"
        words = " ".join(self._random.choices(["river", "stone", "lamp", "field"], k=30))
        content = f"{self._random.random()} {words}" * self._random.choice((1, 1, 6))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._random.randint(1, 48),
        }
        if behaviour == "sends no JSON":
            headers = {"content-type": "application/json"}
            data = json.dumps(body).encode()[: self._random.randint(1, 40)]
            return self._only(await http.post(path, content=data, headers=headers), 400)
        if behaviour == "sends too much":
            body["messages"][0]["content"] = "x" * (5 << 20)
            return self._only(await http.post(path, json=body), 413)
        if behaviour == "waits for the whole":
            response = await http.post(path, json=body)
            if response.status_code == 200 and not response.json()["choices"][0]["finish_reason"]:
                self.broken.append(f"{behaviour}: no finish reason")
            return self._only(response, 200, 429)
        if behaviour == "asks with a seed":
            response = await http.post(path, json=_SEEDED)
            if response.status_code == 200 and text_of(response.json()) != self._expected:
                self.found["another text than alone"] += 1
            return self._only(response, 200, 429)
        return await self._stream(http, path, body | {"stream": True}, behaviour)

    async def _stream(self, http: httpx.AsyncClient, path: str, body: dict, behaviour: str) -> Any:
        after = self._random.randint(1, 12)
        async with http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                return self._only(response, 429)
            lines = []
            async for line in response.aiter_lines():
                lines.append(line)
                if behaviour == "leaves a stream" and len(lines) > after:
                    return "left"
                if behaviour == "reads slowly":
                    await asyncio.sleep(0.05)
            if "data: [DONE]" not in lines:
                self.broken.append(f"{behaviour}: a stream without an end")
            return 200

    def _only(self, response: httpx.Response, *expected: int) -> int:
        if response.status_code not in expected:
            self.broken.append(f"{response.status_code} in place of {expected}")
        return response.status_code


def text_of(answer: dict[str, Any]) -> str:
    """Of the first choice."""
    return answer["choices"][0]["message"]["content"]


async def soak(url: str, pid: int, clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """Let clients ask, and watch memory."""
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=_LIMITS) as http:
        alone = await http.post(f"{url}/chat/completions", json=_SEEDED)
        one = Soak(url, seed, text_of(alone.json()))
        end, memory = time.monotonic() + seconds, []

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(resident(pid))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *(one.client(http, end) for _ in range(clients)))
        await asyncio.sleep(1)
        text = (await http.get(url.removesuffix("/v1") + "/metrics")).text
        left = {
            line.split()[0].removeprefix("edge_demo_"): int(line.split()[1])
            for line in text.splitlines()
            if not line.startswith("#")
        }
        again = text_of((await http.post(f"{url}/chat/completions", json=_SEEDED)).json())
    broken = one.broken + [
        f"{left[name]} left {name}" for name in ("waiting", "reading", "answering") if left[name]
    ]
    if again != one._expected:
        broken.append("the seeded answer has changed")
    return {"found": dict(one.found), "broken": broken, "memory": memory, "metrics": left}


_LIMITS = httpx.Limits(max_connections=200, max_keepalive_connections=50)


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmRSS")) * 1024


def plot(memory: list[int], path: Path) -> None:
    """Memory over time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    axes.plot([m / 1e6 for m in memory])
    axes.set(xlabel="seconds", ylabel="resident memory, MB", ylim=(0, None))
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "edge_demo", "serve", str(arguments.bundle)]
    server = Server("edge-demo serve", [*command, "--port", "{port}", "--queue", "16"])
    with running(server) as (url, process):
        result = asyncio.run(
            soak(url, process.pid, arguments.clients, arguments.seconds, arguments.seed)
        )
        if process.poll() is not None:
            result["broken"].append("the server has ended")
    print(processor())
    for name, count in sorted(result["found"].items()):
        print(f"* {name}: {count:,}")
    memory = result["memory"]
    quarter = max(1, len(memory) // 4)
    for name, part in (("first", memory[:quarter]), ("last", memory[-quarter:])):
        print(f"* memory in the {name} quarter: {min(part) / 1e6:.0f} to {max(part) / 1e6:.0f} MB")
    print(f"* {json.dumps(result['metrics'])}")
    for text in result["broken"][:20]:
        print(f"BROKEN: {text}")
    if arguments.plot is not None:
        plot(memory, arguments.plot)
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
