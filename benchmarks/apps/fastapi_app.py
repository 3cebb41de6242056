"""FastAPI and sentence-transformers, a request at a time: `python -m benchmarks.apps.fastapi_app FOLDER PORT DTYPE`."""

from __future__ import annotations

import sys
import threading

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.apps.sentences import load

app = FastAPI()
device = threading.Lock()  # endpoints run in 40 threads, which would slow each other down


class Body(BaseModel):
    input: str | list[str]


@app.post("/embed")
def embed(body: Body) -> dict[str, list[float] | list[list[float]]]:
    inputs = [body.input] if isinstance(body.input, str) else body.input
    with device:
        rows = app.state.embed(inputs)
    return {"embedding": rows[0] if isinstance(body.input, str) else rows}


if __name__ == "__main__":
    app.state.embed = load(sys.argv[1], sys.argv[3])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
