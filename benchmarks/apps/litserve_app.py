"""LitServe and sentence-transformers, batched: `python -m benchmarks.apps.litserve_app FOLDER PORT DTYPE`."""

from __future__ import annotations

import sys
from typing import Any

import litserve

from benchmarks.apps.sentences import load

Input = str | list[str]


class Api(litserve.LitAPI):
    """Batches of up to 64 requests that arrive within 10 ms; `encode` sorts them and splits them into batches of 32."""

    def setup(self, device: str) -> None:
        self.embed = load(sys.argv[1], sys.argv[3])

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # an annotation would become a query field
        return request["input"]

    def batch(self, inputs: list[Input]) -> list[Input]:
        return inputs

    def predict(self, x: list[Input]) -> list[Any]:
        rows = iter(self.embed([text for one in x for text in ([one] if isinstance(one, str) else one)]))
        return [next(rows) if isinstance(one, str) else [next(rows) for _ in one] for one in x]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: list[Any]) -> dict[str, list[Any]]:
        return {"embedding": output}


if __name__ == "__main__":
    api = Api(max_batch_size=64, batch_timeout=0.01, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
