"""What BentoML's timeout middleware costs: `python -m benchmarks.bento_timers`.

Embeds short texts with the bundled model through an ASGI app, with that middleware around it and without, in turns.
Prints requests per second, and the memory that a request still holds after its response. The middleware keeps a timer
for each request until the timeout has passed, so at R requests per second R * 150 of them are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Sequence

import psutil
import uvloop
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks import report
from embedder import Embedder
from embedder.engine.aio import embed_all
from embedder.engine.engine import Engine
from embedder.inputs.items import EmbeddingItem, Text

TIMEOUT_S, CALLERS = 150, 64
SCOPE: Scope = {"type": "http", "method": "POST", "path": "/txt/embed", "headers": []}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float | str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    rows: list[dict[str, float | str]] = []
    with Embedder(device="cpu") as embedder:
        plain = embedding_app(embedder.engine)
        for _ in range(chosen.rounds):
            for name, app in (("without", plain), ("with BentoML's", TimeoutMiddleware(plain, TIMEOUT_S))):
                rows.append({"timeout middleware": name, **uvloop.run(measure(app, chosen.requests))})
    print(report.table(tuple(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    return rows


def embedding_app(engine: Engine) -> ASGIApp:
    """Embeds one text for each request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await embed_all(engine, [EmbeddingItem((Text("red"),))], 60)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


async def measure(app: ASGIApp, num_requests: int) -> dict[str, float]:
    """Requests per second, and bytes per request that are held afterwards."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        pass

    async def call(count: int) -> None:
        for _ in range(count):
            await app(dict(SCOPE), receive, send)

    await call(200)
    gc.collect()
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    await asyncio.gather(*(call(num_requests // CALLERS) for _ in range(CALLERS)))
    seconds = time.monotonic() - start
    gc.collect()
    held = psutil.Process().memory_info().rss - before
    return {"requests/s": round(num_requests / seconds), "held bytes per request": round(held / num_requests)}


if __name__ == "__main__":
    main()
