"""A client of services with the `local` schema: one path for texts and one for images, as in `models.yaml`.

The client reads `/openapi.json` (or BentoML's `/docs.json`). It sends lists only if the document allows an array with
`maxItems` for the field; a list of images is sent as `inputs`. Nothing is specific to this project's service.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import orjson
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.quality.targets import TIMEOUT_S, RequestFailed, post

MOST_TOGETHER = 64  # items per request, even if a service allows more


@dataclass(frozen=True)
class Endpoint:
    """The route of one kind of content."""

    path: str
    method: str = "POST"
    input_field: str = "input"
    output_field: str = "embedding"


@dataclass(frozen=True)
class LocalService:
    """A service with `provider_type: local` in a `models.yaml`."""

    name: str
    base_url: str
    text: Endpoint = Endpoint("/txt/embed")
    image: Endpoint = Endpoint("/img/embed")


def read_models(path: Path) -> list[LocalService]:
    """All local services in a `models.yaml`, at any depth. Other provider types are ignored."""
    return list(_local_services(yaml.safe_load(path.read_text(encoding="utf-8"))))


def _local_services(node: Any) -> Iterator[LocalService]:
    if not isinstance(node, Mapping):
        return
    for name, value in node.items():
        if isinstance(value, Mapping) and value.get("provider_type") == "local":
            endpoints = {kind: Endpoint(**value[f"{kind}_endpoint"]) for kind in ("text", "image")}
            yield LocalService(str(name), value["base_url"], **endpoints)
        else:
            yield from _local_services(value)


class Client:
    """Embed with a local service. Raises `RequestFailed` for a status other than 200 and for missing vectors."""

    def __init__(self, service: LocalService) -> None:
        self.service = service
        self.http = httpx.Client(base_url=service.base_url, timeout=TIMEOUT_S)
        self.document = self._document()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors (num_texts, dimensions) as returned, not necessarily of unit length."""
        endpoint = self.service.text
        return self._embed(endpoint, endpoint.input_field, texts, f"{self.service.name}: texts")

    def embed_images(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """As `embed_texts`. `images`: encoded image files."""
        entries = [base64.b64encode(image).decode() for image in images]
        return self._embed(self.service.image, "inputs", entries, f"{self.service.name}: images")

    def max_items(self, endpoint: Endpoint) -> int:
        """The maximum of items per request in the service's document; 1 if it allows no lists."""
        operation = self.document.get("paths", {}).get(endpoint.path, {}).get(endpoint.method.lower(), {})
        body = self._resolved(operation.get("requestBody", {}))
        schema = self._resolved(body.get("content", {}).get("application/json", {}).get("schema", {}))
        field = self._resolved(schema.get("properties", {}).get(endpoint.input_field, {}))
        lists = [option for option in map(self._resolved, field.get("anyOf", [])) if option.get("type") == "array"]
        return max((int(option.get("maxItems", 1)) for option in lists), default=1)

    def _embed(self, endpoint: Endpoint, list_field: str, entries: Sequence[str], what: str) -> NDArray[np.float32]:
        together = min(self.max_items(endpoint), MOST_TOGETHER)
        rows: list[Any] = []
        with tqdm(total=len(entries), desc=what, unit="item") as bar:
            for start in range(0, len(entries), together):
                chunk = entries[start : start + together]
                fields = {endpoint.input_field: chunk[0]} if together == 1 else {list_field: list(chunk)}
                answer = post(self.http, endpoint.path, orjson.dumps(fields), endpoint.method)
                rows += [answer[endpoint.output_field]] if together == 1 else answer[endpoint.output_field]
                bar.update(len(chunk))
        if len(rows) != len(entries):
            raise RequestFailed(f"{endpoint.path} answered {len(rows)} vectors for {len(entries)} items")
        return np.array(rows, np.float32)

    def _document(self) -> dict[str, Any]:
        for path in ("/openapi.json", "/docs.json"):
            response = self.http.get(path)
            if response.status_code == 200:
                document: dict[str, Any] = response.json()
                return document
        return {}

    def _resolved(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """Resolve a `$ref`."""
        if "$ref" not in node:
            return node
        target: Any = self.document
        for name in node["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        return self._resolved(target)
