"""Starlette and uvicorn with prepared bodies, the upper limit: `python -m benchmarks.apps.bare_app FOLDER PORT`.

FOLDER contains response bodies of the service: `1.json` for one item, and `32.json` for 32 items, sent for every list.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

ONE_ITEM = b'{"input":"'  # as the load generator writes it


async def embed(request: Request) -> Response:
    body = await request.body()
    return Response(app.state.one if body.startswith(ONE_ITEM) else app.state.many, media_type="application/json")


app = Starlette(routes=[Route("/embed", embed, methods=["POST"])])

if __name__ == "__main__":
    app.state.one, app.state.many = (Path(sys.argv[1], name).read_bytes() for name in ("1.json", "32.json"))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
