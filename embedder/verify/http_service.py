"""A running service, queried over HTTP only."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from embedder.errors import EmbedderError
from embedder.verify.probes import Vector
from embedder.verify.results import shorten


class ServiceUnreachable(EmbedderError):
    """No HTTP server responds at the address."""


class ServiceFault(EmbedderError):
    """The service responds with an error or with a body that does not match /openapi.json."""


class Service:
    """A client of the service at `url`, with the same `info` and `embed` as `Embedder`, and `score` as `Reranker`."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def info(self) -> Mapping[str, Any]:
        """The body of `GET /info`."""
        body = self._request("/info")
        if not isinstance(body, dict):
            raise ServiceFault(f"/info returned {shorten(body)}; expected an object")
        return body

    def embed(self, items: Iterable[Any], *, dimensions: int | None = None) -> list[Vector]:
        """Embed `items` with `POST /embed`."""
        items = list(items)
        options = {} if dimensions is None else {"dimensions": dimensions}
        body = self._request("/embed", {"items": items, **options})
        return _vectors("/embed", body, lambda: [row["embedding"] for row in body["results"]], len(items))

    def embed_texts(self, texts: Sequence[str]) -> list[Vector]:
        """Embed `texts` with `POST /txt/embed`."""
        body = self._request("/txt/embed", {"input": texts})
        return _vectors("/txt/embed", body, lambda: body["embedding"], len(texts))

    def score(self, query: Any, documents: Iterable[Any], *, instruction: str | None = None) -> list[float]:
        """Score `documents` with `POST /rerank`, in their order."""
        documents = list(documents)
        body = self._request("/rerank", {"query": query, "documents": documents, "instruction": instruction})
        try:
            scores = {row["index"]: float(row["score"]) for row in body["results"]}
            return [scores[index] for index in range(len(documents))]
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceFault(f"/rerank returned {shorten(body)}; expected one score per document") from error

    def _request(self, path: str, fields: Mapping[str, Any] | None = None) -> Any:
        data = None if fields is None else json.dumps(fields).encode()
        request = urllib.request.Request(  # noqa: S310 - the command line accepts http and https only
            f"{self.url}{path}", data, self.headers
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:  # noqa: S310 - as above
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise ServiceFault(f"{path} returned status {error.code}: {shorten(error.read())}") from error
        except ValueError as error:
            raise ServiceFault(f"{path} returned a body that is not JSON") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnreachable(f"{self.url}{path}: {error}") from error


def _vectors(path: str, body: Any, read: Callable[[], Any], num_items: int) -> list[Vector]:
    try:
        vectors = [np.array(vector, np.float32) for vector in read()]
    except (KeyError, TypeError, ValueError) as error:
        raise ServiceFault(f"{path} returned {shorten(body)}; expected one vector per item") from error
    if len(vectors) != num_items or any(vector.ndim != 1 for vector in vectors):
        raise ServiceFault(f"{path} returned {len(vectors)} vectors for {num_items} items")
    return vectors
