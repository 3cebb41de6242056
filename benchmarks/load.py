"""The driver: `concurrency` callers, each with one request on its way at a time, for some seconds.

aiohttp, because the driver must not be what is measured. Against the bare app with 64 callers, CPU of the driver for
one request and requests a second: httpx with one client 13.8 ms, 69/s; aiohttp 0.23 ms, 2808/s (2 busy cores of a Xeon,
2026-11-22).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

JSON = {"content-type": "application/json"}
MAX_KEPT_BYTES = 64 * 2**20


@dataclass
class Load:
    """What came of it. `answers`: (number of the body, the answer's bytes), kept until they are 64 MiB.

    `num_unfinished` requests had no answer when as much time again had passed; they were given up.
    """

    latencies_s: list[float] = field(default_factory=list)
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    num_refused: int = 0
    num_unfinished: int = 0
    wall_s: float = 0.0
    driver_cpu_s: float = 0.0

    @property
    def requests_per_s(self) -> float:
        """Those that were answered."""
        return len(self.latencies_s) / self.wall_s


async def drive(
    url: str, bodies: Sequence[bytes], *, concurrency: int, seconds: float, max_requests: int = 1_000_000
) -> Load:
    """Requests are sent for `seconds`, or until there were `max_requests`; bodies take turns."""
    load = Load()
    numbers = iter(range(max_requests))
    cpu_s, start = time.process_time(), time.perf_counter()
    kept = 0

    async def call(session: aiohttp.ClientSession) -> None:
        nonlocal kept
        for number in numbers:
            sent = time.perf_counter()
            if sent - start > seconds:
                return
            body = number % len(bodies)
            async with session.post(url, data=bodies[body]) as response:
                answer = await response.read()
            load.wall_s = time.perf_counter() - start
            if response.status != 200:
                load.num_refused += 1
                continue
            load.latencies_s.append(time.perf_counter() - sent)
            if (kept := kept + len(answer)) < MAX_KEPT_BYTES:
                load.answers.append((body, answer))

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),  # the wait below is the timeout
        headers=JSON,
    ) as session:
        callers = [asyncio.create_task(call(session)) for _ in range(concurrency)]
        done, pending = await asyncio.wait(callers, timeout=2 * seconds)
        for caller in pending:
            caller.cancel()
        for caller in done:
            caller.result()  # an error of ours, or a connection that broke
    load.num_unfinished = len(pending)
    load.wall_s = load.wall_s if not pending else time.perf_counter() - start
    load.driver_cpu_s = time.process_time() - cpu_s
    return load
