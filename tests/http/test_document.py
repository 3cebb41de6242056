"""`POST /embed` with a document: the routes in this process, the documents in confined ones."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import orjson
import pytest

from benchmarks.demo_documents import join, stream
from embedder import Embedder
from embedder.documents.pages import DocumentReader
from embedder.errors import InvalidRequest, RequestTooLarge
from embedder.http.api_keys import ApiKeys
from embedder.http.boundary import RequestBoundary
from embedder.http.dialects.dialect import ServedModel
from embedder.http.dialects.document import DocumentResponse, parse_pages
from embedder.http.document_pages import MAX_RENDERED_PAGES, DocumentPages, DocumentTurns, _Reader
from embedder.http.drain import Drain
from embedder.http.guard import RequestGuard
from embedder.http.routes import Routes, Serving
from embedder.playground.collection import Collection
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from tests.documents.hostile_pdfs import BAD_PAGES, GOOD, ODD, REFUSED, many_characters
from tests.inputs.killed import kill_at

MAX_PAGES = 4


class App:
    """The routes over a model, with documents allowed."""

    def __init__(self, embedder: Embedder, runner: asyncio.Runner, **options: Any) -> None:
        self.runner = runner
        self.settings = Settings(**{"max_document_pages": MAX_PAGES, **options})
        self.routes = Routes(self.settings, Metrics(()), version="1", needs_key=False)
        collection = Collection(Settings(), is_bundled_model=False)
        model = ServedModel("the model", 100)
        serving = Serving(embedder.engine, embedder.preprocessor, model, {}, collection, 0.0, lambda: True)
        self.routes.serving = serving
        drain = Drain()
        guard = RequestGuard(self.routes, self.settings, keys=ApiKeys(self.settings), drain=drain)
        self.app = RequestBoundary(guard, drain=drain, is_logged=False)

    def post(self, *documents: Any, **options: Any) -> list[httpx.Response]:
        """The responses to requests that are sent at the same time."""

        async def send() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                bodies = [{"document": _encode(one), **options} for one in documents]
                return await asyncio.gather(*(client.post("/embed", json=body) for body in bodies))

        return self.runner.run(send())

    def close(self) -> None:
        """End the processes."""
        self.routes.close()

    def free_places(self) -> int:
        """How many more pages may be rendered now."""

        async def count() -> int:
            await asyncio.sleep(0)  # the callbacks of finished pages
            return self.routes._document_pages._turns.num_free_pages

        return self.runner.run(count())


def _encode(document: Any) -> Any:
    return base64.b64encode(document).decode() if isinstance(document, bytes) else document


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def app(embedder: Embedder, runner: asyncio.Runner) -> Iterator[App]:
    with contextlib.closing(App(embedder, runner)) as app:
        yield app


def make_report(num_pages: int) -> bytes:
    """A PDF of small pages, each of another gray."""
    kids = " ".join(f"{3 + 2 * page} 0 R" for page in range(num_pages))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {num_pages} >>".encode(),
    ]
    for page in range(num_pages):
        content = f"{page / num_pages} g 0 0 20 36 re f".encode()
        kind = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 36 36] /Contents {4 + 2 * page} 0 R >>"
        objects += [kind.encode(), stream("", content)]
    return join(objects)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PDF of three pages."""
    path = tmp_path_factory.mktemp("report") / "report.pdf"
    path.write_bytes(make_report(3))
    return path


def two_pages(first: str, second: str) -> bytes:
    """A PDF of two pages with these boxes."""
    page = "<< /Type /Page /Parent 2 0 R /MediaBox [{}] /Contents 5 0 R >>"
    return join(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R 4 0 R] /Count 2 >>",
            page.format(first).encode(),
            page.format(second).encode(),
            stream("", b"1 0 0 rg 0 0 100 100 re f"),
        ]
    )


def test_pages_have_the_vectors_of_their_pictures(app: App, embedder: Embedder, report: Path) -> None:
    (response,) = app.post(report.read_bytes())
    assert response.status_code == 200, response.text
    DocumentResponse.model_validate(response.json())
    results = response.json()["results"]
    assert [(one["index"], one["page"]) for one in results] == [(0, 1), (1, 2), (2, 3)]
    with DocumentReader(Settings()) as reader:
        regime = embedder.preprocessor.vision.regime
        expected = embedder.embed([reader.render(report, number, regime).image for number in (1, 2, 3)])
    np.testing.assert_allclose([one["embedding"] for one in results], expected, atol=1e-5)


def test_chosen_pages_come_in_the_order_asked_for_and_options_apply(app: App, report: Path) -> None:
    (response,) = app.post(report.read_bytes(), pages="3, 1-2", dimensions=64, output_dtype="int8")
    results = response.json()["results"]
    assert [one["page"] for one in results] == [3, 1, 2]
    assert all(len(one["embedding"]) == 64 and isinstance(one["embedding"][0], int) for one in results)


def test_data_uri_and_concurrent_documents_are_taken(app: App, report: Path) -> None:
    uri = f"data:application/pdf;base64,{base64.b64encode(report.read_bytes()).decode()}"
    responses = app.post(uri, *[report.read_bytes()] * 5, GOOD)
    assert [len(one.json()["results"]) for one in responses] == [3] * 6 + [1]
    assert app.free_places() == MAX_RENDERED_PAGES


def take_turns(runner: asyncio.Runner, *expected_s: float, cancelled: Sequence[int] = ()) -> list[int]:
    """The order in which one reader is given to requests that arrive in this order."""

    async def run() -> list[int]:
        order: list[int] = []
        reader = _Reader(Settings())
        turns = DocumentTurns([reader])

        async def request(number: int, seconds: float) -> None:
            taken = await turns.take(number, seconds)
            order.append(number)
            await asyncio.sleep(0)
            turns.release_page()
            turns.give_back(taken)

        await turns.take("before", 1.0)
        tasks = [asyncio.create_task(request(number, seconds)) for number, seconds in enumerate(expected_s)]
        await asyncio.sleep(0)
        turns.give_back(reader)  # the first one has its turn, but has not noticed
        turns.release_page()
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (turns._free, turns.num_free_pages) == ([reader], MAX_RENDERED_PAGES)
        reader.close()
        return order

    return runner.run(run())


def test_document_with_quick_pages_goes_before_those_whose_last_page_took_long(runner: asyncio.Runner) -> None:
    assert take_turns(runner, 4.0, 4.0, 0.1, 0.01) == [3, 2, 0, 1]


def test_equal_documents_take_turns_in_the_order_in_which_they_ask(runner: asyncio.Runner) -> None:
    assert take_turns(runner, 20.0, 4.0, 1.0) == [0, 1, 2]


def test_cancelled_turn_goes_to_the_next_document(runner: asyncio.Runner) -> None:
    assert take_turns(runner, 0.1, 0.1, 0.1, 0.1, cancelled=(0, 2)) == [1, 3]


def test_documents_take_turns_of_one_page(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Hashable] = []
    take = DocumentTurns.take

    async def noted(turns: DocumentTurns, request: Hashable, expected_s: float) -> _Reader:
        asked.append(request)
        return await take(turns, request, expected_s)

    monkeypatch.setattr(DocumentTurns, "take", noted)
    assert [one.status_code for one in app.post(*[make_report(4)] * 3)] == [200] * 3
    assert len(asked) == 3 * (1 + 4)  # a document is opened in a turn of its own


def test_page_that_cannot_be_rendered_fails_alone(app: App) -> None:
    (response,) = app.post(two_pages("0 0 100000 10", "0 0 100 100"))
    assert response.status_code == 200
    first, second = response.json()["results"]
    assert first["error"]["code"] == "invalid_media"
    assert len(second["embedding"]) > 0
    (response,) = app.post(BAD_PAGES["too-wide"])
    assert response.status_code == 400
    assert response.json()["results"][0]["page"] == 1


def test_page_with_too_much_text_to_read_has_its_vector(app: App) -> None:
    assert app.post(many_characters(12_000_000))[0].status_code == 200


def test_page_whose_process_is_killed_is_rendered_once_more(
    app: App, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a picture is, with the same status if it is killed again."""
    expected = app.post(report.read_bytes())[0].json()
    kills = kill_at(monkeypatch, "render")
    (response,) = app.post(report.read_bytes())
    found = response.json()
    assert (kills, response.status_code) == (["render"], 200)
    # other pages may share its batch now, which changes the last digits
    vectors, expected_vectors = ([one.pop("embedding") for one in body["results"]] for body in (found, expected))
    assert found == expected
    np.testing.assert_allclose(vectors, expected_vectors, atol=1e-6)
    kill_at(monkeypatch, "render", times=1000)
    (response,) = app.post(report.read_bytes())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_media")
    assert "failed on this file (status -9)" in response.json()["error"]["message"]
    assert app.free_places() == MAX_RENDERED_PAGES


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ("4", "got 4; the document has pages 1 to 3"),
        ("0", "got '0' (a string); allowed: numbers and ranges from 1"),
        ("3-1", "got '3-1' (a string); allowed"),
        ("1-", "allowed: numbers and ranges"),
        ("", "allowed: numbers and ranges"),
        ("x", "allowed: numbers and ranges"),
        ("\u0661", "allowed: numbers and ranges"),
        ("1," * 9999, "characters; allowed"),
        (5, "pages: got 5"),
    ],
)
def test_pages_that_do_not_exist_are_refused(pages: Any, reason: str, app: App, report: Path) -> None:
    (response,) = app.post(report.read_bytes(), pages=pages)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_ranges_are_counted_before_they_are_expanded() -> None:
    assert parse_pages("7,1-3", 4) == (7, 1, 2, 3)
    with pytest.raises(RequestTooLarge, match="5 or more pages; allowed: up to 4"):
        parse_pages("1-3,4-5", 4)
    with pytest.raises(RequestTooLarge):
        parse_pages(",".join(["1-20000"] * 1000), 100)
    with pytest.raises(InvalidRequest):
        parse_pages("1-99999", 100)


def test_document_of_more_pages_than_allowed_is_refused_unless_some_are_chosen(app: App) -> None:
    data = make_report(6)
    refused, taken = app.post(data)[0], app.post(data, pages="5-6")[0]
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert "6 or more pages; allowed: up to 4" in refused.json()["error"]["message"]
    assert [one["page"] for one in taken.json()["results"]] == [5, 6]


@pytest.mark.parametrize("name", REFUSED)
def test_document_that_cannot_be_opened_says_why(name: str, app: App) -> None:
    (response,) = app.post(REFUSED[name][0])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_media")
    assert REFUSED[name][1] in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"document": "%%%"}, "document is not valid base64"),
        ({"document": 5}, "document: got 5"),
        ({"document": "AAAA", "items": ["a"]}, "items"),
        ({"document": "AAAA", "dimensions": "x"}, "dimensions"),
        ({"document": "AAAA", "normalize": False, "output_dtype": "int8"}, "normalize"),
    ],
)
def test_wrong_fields_are_refused(body: dict[str, Any], reason: str, app: App) -> None:
    (response,) = app.post(body.pop("document"), **body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_hostile_documents_leave_the_routes_working(app: App) -> None:
    names = ["page-tree-loop", "missing-font", "javascript", "deep-dictionary", "not-operators", "truncated-stream"]
    for response in app.post(*(ODD[name] for name in names)):
        assert response.status_code in (200, 400, 413)
    (response,) = app.post(GOOD)
    assert response.status_code == 200
    assert app.free_places() == MAX_RENDERED_PAGES


def test_documents_are_refused_unless_the_operator_allows_them(embedder: Embedder, runner: asyncio.Runner) -> None:
    with contextlib.closing(App(embedder, runner, max_document_pages=0)) as app:
        (response,) = app.post(GOOD)
    assert response.status_code == 400
    assert "the operator sets EMBEDDER_MAX_DOCUMENT_PAGES" in response.json()["error"]["message"]


def test_request_that_takes_too_long_frees_what_it_holds(
    embedder: Embedder, runner: asyncio.Runner, report: Path
) -> None:
    with contextlib.closing(App(embedder, runner)) as app:
        pages = app.routes._document_pages
        pages._settings = app.settings.model_copy(update={"request_timeout_s": 0.001})
        (late,) = app.post(report.read_bytes())
        assert late.status_code == 504
        pages._settings = app.settings
        (response,) = app.post(report.read_bytes())
        assert response.status_code == 200
        assert app.free_places() == MAX_RENDERED_PAGES


def test_openapi_describes_documents_only_where_they_are_allowed() -> None:
    def schemas(max_document_pages: int) -> Any:
        settings = Settings(max_document_pages=max_document_pages)
        routes = Routes(settings, Metrics(()), version="1", needs_key=False)
        routes.close()
        document = orjson.loads(routes._document)
        body = document["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return jsonschema_rs.Draft202012Validator({**body, "components": document["components"]})

    body = {"document": "AAAA", "pages": "1-3", "dimensions": 64}
    assert schemas(1).is_valid(body)
    assert not schemas(0).is_valid(body)
    assert schemas(1).is_valid({"items": ["a"]})


def test_close_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit on processes it could not, and the close of the model after it would not run."""
    pages = DocumentPages(Settings())
    with monkeypatch.context() as patch:
        patch.delattr(threading.Thread, "start")
        pages.close()
