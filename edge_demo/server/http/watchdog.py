"""Starts and ends the worker, and tells systemd of it: `sd_notify(3)` and its watchdog.

Without systemd nothing is sent. A message is a datagram to the socket in `NOTIFY_SOCKET`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

from edge_demo.server.worker.owner import EngineOwner


def notify(state: str) -> None:
    """Tell systemd a state, such as `READY=1`, if it listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # a name in the abstract namespace
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(state.encode())


def period_s() -> float | None:
    """Seconds between two signs of life, a third of what systemd waits; `None` if it waits not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    own = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not own or not microseconds.isdecimal() or not int(microseconds):
        return None
    return int(microseconds) / 3e6


async def keep_alive(worker: EngineOwner) -> None:
    """Give signs of life until cancelled, as long as the worker makes progress."""
    period = period_s()
    if period is None:
        return
    while True:
        if worker.alive and worker.stalled_s < 3 * period:
            notify("WATCHDOG=1")
        await asyncio.sleep(period)


@contextlib.asynccontextmanager
async def working(worker: EngineOwner) -> AsyncIterator[None]:
    """Start a worker, watch it, and end it when its jobs have ended."""
    worker.start()
    alive = asyncio.create_task(keep_alive(worker))
    try:
        yield
    finally:
        notify("STOPPING=1")
        alive.cancel()
        await asyncio.to_thread(worker.close)
