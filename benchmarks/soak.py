"""Send many mixed requests, compare each result, and check that memory stays flat: `python -m benchmarks.soak`.

It uses the `tiny` shape. The requests contain one or several texts, images, videos and combinations, for all embedding
routes. One in ten is invalid and must be rejected. The expected vectors are computed by the library, one item at a
time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import contenders, report
from benchmarks.checkpoints import random_folder
from benchmarks.load import JSON
from benchmarks.meter import footprint, medians
from benchmarks.workloads import Item, make_items, read_words
from embedder.embedder import Embedder

CALLERS = 16
NUM_ITEMS = 48  # distinct items
MAX_ITEMS = 4  # per request
MAX_DIFFERENCE = 1e-5  # per value, float32; the batch changes the order of sums
MAX_GROWTH_MB, MAX_GROWTH_FILES = 64, 8  # from the second tenth to the last, of the medians
NUM_SAMPLES = 200  # of memory and files; single samples differ by about 50 MB, because batches differ
SEED = 11
FAULTS: tuple[tuple[str, bytes], ...] = (
    ("/txt/embed", b'{"input": ["red", 5]}'),
    ("/img/embed", b'{"input": "AAAA"}'),
    ("/embed", b'{"items": [{"image": "AAAA"}]}'),
    ("/v1/embeddings", b'{"input": [1, 2, 3]}'),
    ("/v2/embed", b'{"texts": ["red"'),
)


@dataclass(frozen=True)
class Request:
    """A request. `expected`: (num_items, hidden_size), or None if it must be rejected."""

    path: str
    body: bytes
    expected: NDArray[np.float32] | None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Send mixed requests and compare each result with its known vectors.")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(arguments)
    about = report.environment(report.command("soak", chosen))
    with random_folder("tiny") as folder:
        requests = _requests(folder)
        service = contenders.service(contenders.OURS, ".", folder, "/txt/embed")
        try:
            service.start(b'{"input": "red"}')
            figures = asyncio.run(_soak(service, requests, chosen.requests))
        finally:
            service.stop()
    is_flat = figures["growth_mb"] <= MAX_GROWTH_MB and figures["growth_files"] <= MAX_GROWTH_FILES
    data = {"environment": about, **figures, "is_held": is_flat and not figures["wrong"]}
    rows = [[name, report.number(figures[name]), allowed] for name, allowed in _ALLOWED.items()]
    text = report.table(("what", "got", "allowed"), rows)
    memory = {"memory": {name: figures[f"{name}_mb"] for name in ("start", "end")}}
    report.save(chosen.results, "soak", data, text, memory, "MB")
    print(text)
    return data


_ALLOWED = {
    "answered": "all",
    "refused": "every faulty one",
    "wrong": 0,
    "growth_mb": MAX_GROWTH_MB,
    "growth_files": MAX_GROWTH_FILES,
    "requests_per_s": "",
}


def _requests(folder: Path) -> list[Request]:
    """Random requests for each route, a tenth of them invalid."""
    words = read_words(folder)
    texts, images = make_items("text-mixed", NUM_ITEMS, words), make_items("image-256", NUM_ITEMS, words)
    pictures = [_base64(item) for item in images]
    native: list[Item] = [*texts, *({"image": picture} for picture in pictures)]
    for number, text in enumerate(texts):
        picture = pictures[number]
        native.append({"content": [{"type": "text", **text}, {"type": "image", "image": picture}]})
        native.append({"video": [picture, pictures[number - 1]]})
    with Embedder(str(folder), device="cpu", dtype="float32") as embedder:
        known = np.stack([embedder.embed([item])[0] for item in tqdm(native, desc="known answers", unit="item")])
    rng = np.random.default_rng(SEED)
    requests = []
    for _ in range(90):
        chosen = rng.integers(0, len(native), rng.integers(1, MAX_ITEMS + 1))
        requests.append(Request("/embed", orjson.dumps({"items": [native[index] for index in chosen]}), known[chosen]))
        ours = chosen % NUM_ITEMS
        inputs = [texts[index]["text"] for index in ours]
        for path, fields in (
            ("/txt/embed", {"input": inputs}),
            ("/v1/embeddings", {"input": inputs, "encoding_format": "base64"}),
            ("/v2/embed", {"texts": inputs}),
            ("/embed_texts", {"texts": inputs}),
        ):
            requests.append(Request(path, orjson.dumps(fields), known[ours]))
        body = orjson.dumps({"input": [pictures[index] for index in ours]})
        requests.append(Request("/img/embed", body, known[ours + NUM_ITEMS]))
    requests += [Request(*FAULTS[index % len(FAULTS)], None) for index in range(len(requests) // 9)]
    return [requests[index] for index in rng.permutation(len(requests))]


def _base64(item: Item) -> str:
    return base64.b64encode(item["image"]).decode()


async def _soak(service: contenders.Contender, requests: list[Request], count: int) -> dict[str, Any]:
    assert service.process is not None
    pid, base = service.process.pid, service.url.removesuffix(service.path)
    outcomes: Counter[str] = Counter()
    footprints = []
    numbers = iter(range(count))
    start = time.perf_counter()
    with tqdm(total=count, desc="soak", unit="request") as bar:

        async def call(session: aiohttp.ClientSession) -> None:
            for number in numbers:
                request = requests[number % len(requests)]
                async with session.post(base + request.path, data=request.body) as response:
                    outcomes[_outcome(request, response.status, await response.read())] += 1
                if number % max(1, count // NUM_SAMPLES) == 0:
                    footprints.append(footprint(pid))
                bar.update()

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=JSON) as session:
            await asyncio.gather(*(call(session) for _ in range(CALLERS)))
    memory_mb = [round(size / 1e6, 1) for size, _ in footprints]
    _, start_mb, *_, end_mb = medians(memory_mb, 10)
    _, start_files, *_, end_files = medians([files for _, files in footprints], 10)
    return {
        "answered": outcomes["answered"],
        "refused": outcomes["refused"],
        "wrong": outcomes["wrong"],
        "start_mb": start_mb,
        "end_mb": end_mb,
        "growth_mb": end_mb - start_mb,
        "growth_files": end_files - start_files,
        "requests_per_s": count / (time.perf_counter() - start),
        "memory_mb": memory_mb,
    }


def _outcome(request: Request, status: int, answer: bytes) -> str:
    """`answered`, `refused` or `wrong`."""
    if request.expected is None:
        return "refused" if 400 <= status < 500 else "wrong"
    if status != 200:
        return "wrong"
    vectors = _vectors(request.path, orjson.loads(answer))
    is_right = vectors.shape == request.expected.shape and np.abs(vectors - request.expected).max() <= MAX_DIFFERENCE
    return "answered" if is_right else "wrong"


def _vectors(path: str, fields: Any) -> NDArray[np.float32]:
    """The vectors in a response of `path`, (num_items, hidden_size)."""
    match path:
        case "/embed":
            rows = [result["embedding"] for result in fields["results"]]
        case "/v1/embeddings":
            rows = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in fields["data"]]
        case "/v2/embed":
            rows = fields["embeddings"]["float"]
        case "/embed_texts":
            rows = fields
        case _:
            rows = fields["embedding"]
    return np.array(rows, np.float32)


if __name__ == "__main__":
    raise SystemExit(not main()["is_held"])
