"""Embed items with a running service or with the library."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray

from embedder import Embedder

Item = dict[str, Any]  # `text` and `image` (encoded bytes), one of them or both
MAX_WAITS = 20  # for a service whose queue is full
TIMEOUT_S = 600.0


class RequestFailed(RuntimeError):
    """A service returned an error. The message contains the status and the body."""


class Target(Protocol):
    """Embeds items. `info`: the body of `/info`."""

    info: dict[str, Any]

    def embed(self, items: Sequence[Item], instruction: str | None = None) -> NDArray[np.float32]:
        """Unit vectors (num_items, hidden_size). `instruction`: None is the default instruction."""


def name_of(info: dict[str, Any]) -> str:
    """The model's name for reports; of a folder, only the last part."""
    name = str(info["model"])
    return Path(name).name if Path(name).is_absolute() else name


class Library:
    """An `Embedder` in this process."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.info = embedder.info()

    def embed(self, items: Sequence[Item], instruction: str | None = None) -> NDArray[np.float32]:
        return np.stack(self.embedder.embed(items, instruction=instruction))


class Service:
    """The service at `url`, through `POST /embed`, with requests as large as the limits in `/info` allow."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self.info = self.http.get("/info").raise_for_status().json()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def embed(self, items: Sequence[Item], instruction: str | None = None) -> NDArray[np.float32]:
        rows = []
        for body in self._bodies(items, {"encoding_format": "base64", "instruction": instruction}):
            results = post(self.http, "/embed", body)["results"]
            if failed := [result for result in results if "error" in result]:
                raise RequestFailed(f"{len(failed)} items of a request failed; the first error: {failed[0]['error']}")
            rows += [np.frombuffer(base64.b64decode(result["embedding"]), "<f4") for result in results]
        return np.stack(rows)

    def _bodies(self, items: Sequence[Item], options: dict[str, Any]) -> Iterator[bytes]:
        limits = self.info["limits"]
        max_bytes = limits["max_body_bytes"] - 1000 - len(orjson.dumps(options))
        chosen: list[orjson.Fragment] = []
        size = 0
        for item in items:
            entry = orjson.dumps(_wire(item))
            if chosen and (size + len(entry) > max_bytes or len(chosen) == limits["max_items_per_request"]):
                yield orjson.dumps({**options, "items": chosen})
                chosen, size = [], 0
            chosen.append(orjson.Fragment(entry))
            size += len(entry) + 1
        yield orjson.dumps({**options, "items": chosen})


def _wire(item: Item) -> Item:
    return {**item, "image": base64.b64encode(item["image"]).decode()} if "image" in item else item


def post(http: httpx.Client, path: str, body: bytes, method: str = "POST") -> dict[str, Any]:
    """Send a request and return the JSON body. Waits after a 429 for `Retry-After`. Raises `RequestFailed`."""
    for _ in range(MAX_WAITS):
        response = http.request(method, path, content=body, headers={"content-type": "application/json"})
        if response.status_code != 429:
            break
        time.sleep(float(response.headers.get("retry-after", 1)))
    if response.status_code != 200:
        raise RequestFailed(f"{path} returned status {response.status_code}: {response.text[:300]}")
    answer: dict[str, Any] = response.json()
    return answer
