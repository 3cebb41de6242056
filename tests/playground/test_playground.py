"""The playground without a browser: its files, its headers, its collection, and the paths that it does not serve."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from starlette.responses import Response

from embedder import Embedder
from embedder.engine.postprocess import Embedding
from embedder.engine.starter import Starter
from embedder.errors import DeadlineExceeded, InvalidMedia, NotFound, Overloaded, ShuttingDown
from embedder.http.playground_routes import PlaygroundRoutes
from embedder.inputs.items import EmbeddingItem, Image
from embedder.playground.collection import MAX_PICTURES, PAGE, Collection, Picture
from embedder.settings import Settings
from tests.conftest import ROOT, Server, encoded, picture, start_server
from tests.http.asgi import longest_turn_s

FOLDER = ROOT / "embedder" / "playground"
DEMO = ROOT / "embedder" / "demo"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three images, a broken one, an empty one, a text file and a subfolder."""
    folder = tmp_path_factory.mktemp("holiday")
    (folder / "beach.png").write_bytes(encoded(picture(300, 200, 1)))
    (folder / "cliff.JPG").write_bytes(encoded(picture(64, 64, 2), "JPEG"))
    (folder / "dune <b>.webp").write_bytes(encoded(picture(50, 90, 3), "WEBP"))
    (folder / "broken.png").write_bytes(encoded(picture(90, 90))[:-500])
    (folder / "empty.gif").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "album.png").mkdir()
    return folder


@pytest.fixture(scope="module")
def folder_server(
    pictures: Path, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    server = start_server(
        tmp_path_factory.mktemp("server"), model=str(random_checkpoint), device="cpu", demo_folder=str(pictures)
    )
    yield server
    assert server.stop() == 0


def wait_for_collection(server: Server) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        fields: dict[str, Any] = httpx.get(f"{server.url}/playground/collection").json()
        if not fields["status"].startswith("building"):
            return fields
        time.sleep(0.2)
    raise AssertionError("the collection was not built")


@pytest.mark.parametrize("path", ["/playground", *(f"/playground/{name}" for name in PAGE if name != "index.html")])
def test_page_files_are_served_unchanged(path: str, client: httpx.Client) -> None:
    name = path.removeprefix("/playground").strip("/") or "index.html"
    response = client.get(path)
    assert response.content == (FOLDER / name).read_bytes()
    assert response.headers["content-type"] == PAGE[name]


def test_trailing_slash_redirects_to_the_page(client: httpx.Client) -> None:
    response = client.get("/playground/", headers={"host": "example.com"})
    assert (response.status_code, response.headers["location"]) == (307, "../playground")


def test_every_file_of_the_folder_is_declared() -> None:
    files = {path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert files == set(PAGE)


@pytest.mark.parametrize("path", ["/playground", "/playground/script.js", "/playground/collection"])
def test_headers_allow_only_content_of_the_service(path: str, client: httpx.Client) -> None:
    headers = client.get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_page_refers_to_no_host_and_has_no_inline_script_or_style() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>|javascript:", html)
    for name in PAGE:
        text = (FOLDER / name).read_text(encoding="utf-8").replace(' xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|//\w+\.", text.replace("// ", ""))
    assert "innerHTML" not in (FOLDER / "script.js").read_text(encoding="utf-8")  # names are text, not markup


@pytest.mark.parametrize(
    "path",
    [
        "/playground/index.htm",
        "/playground/../service.py",
        "/playground/..%2fplayground.py",
        "/playground/%2e%2e/playground.py",
        "/playground/..%5cplayground.py",
        "/playground//etc/passwd",
        "/playground/%2fetc%2fpasswd",
        "/playground/style.css%00.html",
        "/playground/thumbnails/../style.css",
        "/playground/thumbnails/..%2f..%2fplayground.py",
        "/playground/thumbnails/beach.png",
        "/playground/thumbnails/-1",
        "/playground/thumbnails/1.0",
        "/playground/thumbnails/3",
        "/playground/thumbnails/99999999999999999999",
        f"/playground/thumbnails/{'1' * 5000}",
    ],
)
def test_other_paths_are_not_found(path: str, folder_server: Server) -> None:
    """Paths sent as they are; HTTP clients would normalize them."""
    wait_for_collection(folder_server)
    connection = http.client.HTTPConnection(folder_server.url.removeprefix("http://"), timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 404
    assert json.loads(body)["error"]["code"] == "not_found"


def test_folder_is_embedded_as_its_files_would_be(folder_server: Server, pictures: Path) -> None:
    fields = wait_for_collection(folder_server)
    assert fields["status"] == "ready"
    assert fields["title"] == pictures.name
    assert str(pictures.parent) not in json.dumps(fields)
    assert [entry["name"] for entry in fields["pictures"]] == ["beach.png", "cliff.JPG", "dune <b>.webp"]
    for entry in fields["pictures"]:
        data = base64.b64encode((pictures / entry["name"]).read_bytes()).decode()
        own = httpx.post(f"{folder_server.url}/img/embed", json={"input": data}).json()["embedding"]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(entry["vector"]), "<f4"), own, atol=1e-6)


def test_broken_images_are_skipped_and_listed(folder_server: Server) -> None:
    fields = wait_for_collection(folder_server)
    reasons = {entry["name"]: entry["message"] for entry in fields["skipped"]}
    assert reasons.keys() == {"broken.png", "empty.gif"}
    assert "truncated" in reasons["broken.png"]
    assert reasons["empty.gif"] == "image is empty (0 bytes)"
    assert "the playground skips broken.png: image" in folder_server.log.read_text()


def test_thumbnails_keep_their_shape(folder_server: Server) -> None:
    sizes = []
    for entry in wait_for_collection(folder_server)["pictures"]:
        response = httpx.get(f"{folder_server.url}/playground/{entry['thumbnail']}")
        assert response.headers["content-type"] == "image/webp"
        sizes.append(PIL.Image.open(io.BytesIO(response.content)).size)
    assert sizes == [(192, 128), (64, 64), (50, 90)]


def test_without_a_folder_and_the_small_model_there_is_nothing_to_search(client: httpx.Client) -> None:
    fields = client.get("/playground/collection").json()
    assert (fields["status"], fields["num_pictures"], fields["pictures"]) == ("none", 0, [])


def test_service_without_a_reranker_reranks_nothing(client: httpx.Client) -> None:
    response = client.post("/playground/rerank", json={"query": "red", "rows": [0]})
    assert (response.status_code, response.json()["error"]["message"].partition(":")[0]) == (
        404,
        "this service has no reranker",
    )


@pytest.mark.slow
def test_missing_folder_stops_the_start_with_one_line(random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        start_server(tmp_path, model=str(random_checkpoint), demo_folder="./no-such-folder")
    assert "the service does not start: EMBEDDER_DEMO_FOLDER='no-such-folder' is not a folder" in str(failure.value)
    assert "Traceback" not in str(failure.value)


@pytest.mark.slow
def test_service_ends_cleanly_while_pictures_are_embedded(tmp_path: Path) -> None:
    server = start_server(tmp_path)
    status = httpx.get(f"{server.url}/playground/collection").json()["status"]
    assert server.stop() == 0
    assert status.startswith("building")
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "never retrieved" not in log
    assert "destroyed" not in log


class FakeEngine:
    """Resolves each item with the next of `outcomes`, after a call of `on_submit`."""

    def __init__(self, outcomes: list[Embedding | Exception], on_submit: Any = lambda: None) -> None:
        self.outcomes = outcomes
        self.on_submit = on_submit
        self.lock = threading.RLock()
        self.starter = Starter(lambda: None)

    @contextlib.contextmanager
    def reserve(self, items: Sequence[EmbeddingItem], priority: int) -> Iterator[None]:
        yield

    def submit(self, item: EmbeddingItem, **_: object) -> Future[Embedding]:
        assert len(item.parts) == 1
        self.on_submit()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        future: Future[Embedding] = Future()
        future.set_result(outcome)
        return future


DONE = Embedding(np.ones(4, np.float32) / 2, 20, 0)


def test_status_counts_while_it_is_built(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedder.playground.collection._PIXELS_TOGETHER", 1)
    collection = Collection(Settings(demo_folder=str(pictures)), is_bundled_model=False)
    seen: list[tuple[str, int]] = []

    def look() -> None:
        seen.append((collection.status, len(collection.fields()["pictures"])))

    engine: Any = FakeEngine([DONE, DONE, DONE], look)
    asyncio.run(collection.build(engine))
    assert seen == [("building 0 of 5", 0), ("building 1 of 5", 0), ("building 3 of 5", 0)]
    assert collection.status == "ready"


def test_building_waits_for_a_full_queue_and_stops_with_the_service(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedder.playground.collection._PIXELS_TOGETHER", 1)
    collection = Collection(Settings(demo_folder=str(pictures)), is_bundled_model=False)
    full, slow = Overloaded("full", retry_after_s=0.01), DeadlineExceeded("slow")
    engine: Any = FakeEngine([full, DONE, slow, DONE, ShuttingDown("over")])
    asyncio.run(collection.build(engine))
    assert [picture.name for picture in collection.pictures] == ["beach.png", "cliff.JPG"]
    assert collection.status == "building 3 of 5"


def test_small_queue_gets_one_image_at_a_time(pictures: Path, random_checkpoint: Path) -> None:
    collection = Collection(Settings(demo_folder=str(pictures)), is_bundled_model=False)
    with Embedder(str(random_checkpoint), device="cpu", max_queued_tokens=400) as embedder:
        asyncio.run(collection.build(embedder.engine))
    assert collection.status == "ready"
    assert len(collection.pictures) == 3


def test_large_folder_is_limited_and_the_rest_is_counted(tmp_path: Path) -> None:
    for index in range(MAX_PICTURES + 3):
        (tmp_path / f"{index:05}.png").touch()
    collection = Collection(Settings(demo_folder=str(tmp_path)), is_bundled_model=False)
    assert (collection.num_pictures, collection.num_left_out) == (MAX_PICTURES, 3)


def test_vectors_of_a_large_collection_do_not_hold_the_event_loop(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    collection = Collection(Settings(demo_folder=str(tmp_path)), is_bundled_model=False)
    vector = np.random.default_rng(0).standard_normal(4096, np.float32)
    collection.pictures = [Picture(f"{index}.png", b"", vector, None) for index in range(MAX_PICTURES)]
    collection.num_pictures = MAX_PICTURES
    nothing: Any = None
    routes = PlaygroundRoutes(nothing, lambda: collection, nothing)
    responses: list[Response] = []

    async def respond() -> None:
        responses.append(await routes._collection(nothing))

    assert asyncio.run(longest_turn_s(respond())) < 0.005  # 0.04 s in the event loop
    assert len(responses[0].body) > 20_000_000


def test_pictures_are_read_again_for_the_reranker(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pictures, folder)
    settings = Settings(model="bundled", reranker="any", demo_folder=str(folder))
    collection = Collection(settings, is_bundled_model=False)
    engine: Any = FakeEngine([DONE, DONE, DONE])
    asyncio.run(collection.build(engine))
    (folder / "cliff.JPG").unlink()
    last, gone = collection.documents([2, 1])
    assert isinstance(last, EmbeddingItem)
    assert last.parts == (Image((folder / "dune <b>.webp").read_bytes()),)
    assert isinstance(gone, InvalidMedia)
    assert str(gone) == "the file cannot be read: No such file or directory"
    for row in (3, -1):
        with pytest.raises(NotFound, match="allowed: 0 to 2"):
            collection.documents([0, row])


def test_reranker_by_itself_searches_nothing(pictures: Path) -> None:
    settings = Settings(reranker="any", demo_folder=str(pictures))
    assert Collection(settings, is_bundled_model=True).status == "none"


def test_small_model_comes_with_its_drawings(embedder: Embedder) -> None:
    described = json.loads((DEMO / "drawings.json").read_text(encoding="utf-8"))
    collection = Collection(Settings(), is_bundled_model=True)
    assert collection.num_pictures == len(described["drawings"])
    del collection._sources[5:]
    asyncio.run(collection.build(embedder.engine))
    assert [picture.name for picture in collection.pictures] == [row["name"] for row in described["drawings"][:5]]
    side, sheet = described["tile_pixels"], PIL.Image.open(DEMO / "drawings.png")
    tile = sheet.crop((4 * side, 0, 5 * side, side))
    np.testing.assert_allclose(collection.pictures[4].vector, embedder.embed([tile])[0], atol=1e-6)
    assert collection.license == described["license"]
