"""The load generator: `concurrency` callers, each with one request at a time.

It uses aiohttp, so that its own CPU time does not limit the rate. With the bare app and 64 callers, httpx takes 13.8 ms
of CPU per request (69 requests/s), aiohttp 0.23 ms (2808 requests/s; two busy cores of a Xeon, 2026-11-22).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

JSON = {"content-type": "application/json"}
NO_GZIP = {"accept-encoding": "identity"}  # aiohttp accepts gzip by default
MAX_KEPT_BYTES = 64 * 2**20


@dataclass
class Load:
    """The result. `answers`: (index of the request body, response body), kept up to 64 MiB.

    `num_unfinished`: requests without a response after twice the time, which were cancelled.
    """

    latencies_s: list[float] = field(default_factory=list)
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    num_refused: int = 0
    num_unfinished: int = 0
    wall_s: float = 0.0
    driver_cpu_s: float = 0.0

    @property
    def requests_per_s(self) -> float:
        """The rate of successful requests."""
        return len(self.latencies_s) / self.wall_s


async def drive(
    url: str,
    bodies: Sequence[bytes],
    *,
    concurrency: int,
    seconds: float,
    max_requests: int = 1_000_000,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """Send requests for `seconds`, at most `max_requests`, cycling through `bodies`. `headers`: more than JSON's."""
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
        timeout=aiohttp.ClientTimeout(total=None),  # the wait below limits the time
        headers={**JSON, **(headers or {})},
    ) as session:
        callers = [asyncio.create_task(call(session)) for _ in range(concurrency)]
        done, pending = await asyncio.wait(callers, timeout=2 * seconds)
        for caller in pending:
            caller.cancel()
        for caller in done:
            caller.result()  # raises errors of the caller, such as a lost connection
    load.num_unfinished = len(pending)
    load.wall_s = load.wall_s if not pending else time.perf_counter() - start
    load.driver_cpu_s = time.process_time() - cpu_s
    return load
