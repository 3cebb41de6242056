"""Connections of a pool that were idle for almost a minute, as behind load balancers, are used again."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.conftest import Server

pytestmark = pytest.mark.slow

NUM_CONNECTIONS, IDLE_S = 256, 55


def test_connections_that_were_idle_serve_another_request(server: Server) -> None:
    reused: list[bool] = []

    async def run() -> list[int]:
        trace = aiohttp.TraceConfig()

        async def count(*_: object) -> None:
            reused.append(True)

        trace.on_connection_reuseconn.append(count)
        connector = aiohttp.TCPConnector(limit=NUM_CONNECTIONS, keepalive_timeout=120)
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, trace_configs=[trace], timeout=timeout) as session:

            async def post() -> int:
                async with session.post(f"{server.url}/txt/embed", json={"input": "red"}) as answer:
                    await answer.read()
                    return answer.status

            statuses = list(await asyncio.gather(*(post() for _ in range(NUM_CONNECTIONS))))
            opened = NUM_CONNECTIONS - len(reused)
            reused.clear()
            await asyncio.sleep(IDLE_S)
            statuses += await asyncio.gather(*(post() for _ in range(opened)))
            assert len(reused) == opened > NUM_CONNECTIONS // 2
        return statuses

    assert set(asyncio.run(run())) == {200}
