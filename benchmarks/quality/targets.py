"""Items -> unit vectors, by a running service or by the library: the two ways a user has, and no third."""

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
MAX_WAITS = 20  # for a service that is full
TIMEOUT_S = 600.0


class RequestFailed(RuntimeError):
    """A service gave an error instead of vectors; the message has its status and words."""


class Target(Protocol):
    """`info`: what `/info` says. `name`: the hub id, or the last part of a folder."""

    info: dict[str, Any]

    def embed(self, items: Sequence[Item], instruction: str | None = None) -> NDArray[np.float32]:
        """(num_items, hidden_size) unit vectors. `instruction` of None is the default one."""


def name_of(info: dict[str, Any]) -> str:
    """A model's name for reports and folders: no path of a machine."""
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
    """Our service at `url`, by `POST /embed`: requests as large as its limits at `/info` allow."""

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
                raise RequestFailed(f"{len(failed)} items of a request failed, the first: {failed[0]['error']}")
            rows += [np.frombuffer(base64.b64decode(result["embedding"]), "<f4") for result in results]
        return np.stack(rows)

    def _bodies(self, items: Sequence[Item], options: dict[str, Any]) -> Iterator[bytes]:
        limits = self.info["limits"]
        room = limits["max_body_bytes"] - 1000 - len(orjson.dumps(options))
        chosen: list[orjson.Fragment] = []
        size = 0
        for item in items:
            entry = orjson.dumps(_wire(item))
            if chosen and (size + len(entry) > room or len(chosen) == limits["max_items_per_request"]):
                yield orjson.dumps({**options, "items": chosen})
                chosen, size = [], 0
            chosen.append(orjson.Fragment(entry))
            size += len(entry) + 1
        yield orjson.dumps({**options, "items": chosen})


def _wire(item: Item) -> Item:
    return {**item, "image": base64.b64encode(item["image"]).decode()} if "image" in item else item


def post(http: httpx.Client, path: str, body: bytes, method: str = "POST") -> dict[str, Any]:
    """The JSON answer. Waits while the service is full, as long as it says. Raises `RequestFailed`."""
    for _ in range(MAX_WAITS):
        response = http.request(method, path, content=body, headers={"content-type": "application/json"})
        if response.status_code != 429:
            break
        time.sleep(float(response.headers.get("retry-after", 1)))
    if response.status_code != 200:
        raise RequestFailed(f"{path} answered {response.status_code}: {response.text[:300]}")
    answer: dict[str, Any] = response.json()
    return answer
