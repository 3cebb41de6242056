"""`/metrics` of one service, of two workers and after failures, and the dashboard and alerts that read it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from embedder import Embedder
from embedder.engine.engine import Engine
from embedder.errors import EmbedderError
from embedder.settings import Settings
from embedder.telemetry.metrics import Metrics
from embedder.telemetry.request_metrics import MetricsMiddleware
from tests.conftest import ROOT, Server, encoded, picture, start_server, words
from tests.fake_model import HIDDEN_SIZE, FakeModel, item

REFERENCE = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
PNG = base64.b64encode(encoded(picture(70, 50))).decode()

Numbers = dict[str, float]  # of `name{label="value",..}`, as Prometheus writes a series


def series(name: str, labels: dict[str, str]) -> str:
    return name + ("{" + ",".join(f'{key}="{labels[key]}"' for key in sorted(labels)) + "}" if labels else "")


def parsed(text: str) -> Numbers:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    numbers = {series(sample.name, sample.labels): sample.value for sample in samples}
    assert len(numbers) == len(samples)
    return numbers


def scraped(client: httpx.Client) -> Numbers:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return parsed(response.text)


def moved(client: httpx.Client, act: Callable[[], object]) -> Numbers:
    """By how much each value changes during `act`. The engine counts after the response, so this waits a moment."""
    before = scraped(client)
    act()
    time.sleep(0.2)
    after = scraped(client)
    return defaultdict(float, {name: value - before.get(name, 0) for name, value in after.items()})


def test_metric_files_are_not_sparse(tmp_path: Path) -> None:
    """Writing to a sparse file on a full disk would kill the worker."""
    folder = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    code = (
        f"from embedder.telemetry.metrics import Metrics; metrics = Metrics(('/embed',), {str(tmp_path)!r})\n"
        "from embedder.settings import Settings\n"
        "metrics.serving(Settings(), dict.fromkeys(('model', 'revision', 'device', 'dtype', 'weights')), '1')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | folder)
    sizes = [path.stat() for path in tmp_path.iterdir()]
    assert {path.name.rpartition("_")[0] for path in tmp_path.iterdir()} == {
        "counter",
        "histogram",
        "gauge_livesum",
        "gauge_livemax",
    }
    assert all(size.st_blocks * 512 >= size.st_size for size in sizes)


def test_requests_items_and_tokens_are_counted_by_kind(client: httpx.Client, embedder: Embedder) -> None:
    mixed = {"content": [{"type": "text", "text": "red"}, {"type": "image", "image": PNG}]}
    bodies: list[dict[str, Any]] = []

    def act() -> None:
        items = ["red", "green", {"image": PNG}, mixed, {"image": "!"}]
        bodies.append(client.post("/embed", json={"items": items}).json())

    numbers = moved(client, act)
    assert numbers['embedder_requests_total{route="/embed",status="200"}'] == 1
    assert numbers['embedder_request_duration_seconds_count{route="/embed"}'] == 1
    kinds = {kind: numbers[f'embedder_items_total{{kind="{kind}"}}'] for kind in ("text", "image", "video", "mixed")}
    assert kinds == {"text": 2, "image": 2, "video": 0, "mixed": 1}
    assert numbers['embedder_failed_items_total{code="invalid_media"}'] == 1
    text, visual = (numbers[f'embedder_tokens_total{{kind="{kind}"}}'] for kind in ("text", "visual"))
    assert text + visual == bodies[0]["usage"]["prompt_tokens"]
    assert visual > 0
    assert 0 < numbers["embedder_prefix_tokens_total"] < text
    assert numbers["embedder_batch_items_sum"] == numbers['embedder_queue_wait_seconds_count{stage="device"}'] == 4
    of_vision = 2 * math.ceil(embedder.preprocessor.visual_cost * visual / 2)  # two equal pictures
    assert numbers["embedder_batch_tokens_sum"] == text + visual + of_vision
    assert numbers['embedder_queue_wait_seconds_count{stage="preprocess"}'] == 5
    assert numbers['embedder_preprocess_seconds_count{kind="image"}'] == 2
    assert numbers["embedder_forward_seconds_count"] == numbers["embedder_batch_items_count"] >= 1
    assert numbers["embedder_forward_seconds_sum"] > 0
    assert numbers["embedder_queue_items"] == numbers["embedder_queue_tokens"] == 0


@pytest.mark.parametrize(
    ("path", "body", "route", "status", "code"),
    [
        ("/txt/embed", {"inptu": "red"}, "/txt/embed", 400, "invalid_request"),
        ("/v1/embeddings", {"input": "red", "dimensions": 1}, "/v1/embeddings", 400, "unsupported_dimensions"),
        ("/embed_texts", {"texts": [""]}, "/embed_texts", 400, "invalid_request"),
        ("/embed", {"items": ["red"] * 3000}, "/embed", 413, "request_too_large"),
        ("/no/such/path", {}, "other", 404, "not_found"),
    ],
)
def test_errors_are_counted_by_code(
    client: httpx.Client, path: str, body: dict[str, Any], route: str, status: int, code: str
) -> None:
    numbers = moved(client, lambda: client.post(path, json=body))
    assert numbers[f'embedder_requests_total{{route="{route}",status="{status}"}}'] == 1
    assert numbers[f'embedder_errors_total{{code="{code}"}}'] == 1


def test_unknown_paths_create_no_series(client: httpx.Client) -> None:
    def act(index: int) -> None:
        assert client.get(f"/made-up/{index}?secret={index}").status_code == 404

    act(0)
    before = set(scraped(client))
    for index in range(1, 20):
        act(index)
    assert set(scraped(client)) == before


def test_metrics_describe_the_served_model(client: httpx.Client) -> None:
    info = client.get("/info").json()
    numbers = scraped(client)
    (model,) = [name for name in numbers if name.startswith("embedder_model_info")]
    assert all(
        f'{label}="{info[label] or ""}"' in model
        for label in ("model", "revision", "device", "dtype", "weights", "version")
    )
    assert numbers["embedder_workers"] == numbers[model] == 1
    assert numbers["embedder_queue_limit_tokens"] == info["limits"]["max_queued_tokens"]
    assert numbers["embedder_preprocess_threads"] >= 1


@pytest.mark.slow
def test_two_workers_count_together_and_one_that_was_killed_is_not_counted(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    server = start_server(tmp_path, model=str(random_checkpoint), device="cpu", workers="2", max_input_tokens="64")
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            _wait_for(client, "embedder_workers", 2)

            def ask() -> None:
                for _ in range(40):  # each over a connection of its own, so that both workers get some
                    answer = httpx.post(f"{server.url}/txt/embed", json={"input": words(100)}, timeout=60)
                    assert answer.status_code == 200

            numbers = moved(client, ask)
            assert numbers['embedder_requests_total{route="/txt/embed",status="200"}'] == 40
            assert numbers['embedder_items_total{kind="text"}'] == numbers["embedder_batch_items_sum"] == 40
            assert numbers["embedder_cut_items_total"] == 40
            limit = scraped(client)["embedder_queue_limit_tokens"]
            assert limit == 2 * Settings().max_queued_tokens
        os.kill(server.workers[0], signal.SIGKILL)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            after = _wait_for(client, "embedder_workers", 1)
        assert after['embedder_items_total{kind="text"}'] >= 40
        assert after["embedder_queue_limit_tokens"] == limit / 2
    finally:
        server.stop()


@pytest.mark.parametrize(
    "path", ["/txt/embed", *(pytest.param(path, marks=pytest.mark.slow) for path in ("/embed", "/embed_texts"))]
)
def test_items_are_dropped_when_their_caller_disconnects(path: str, client: httpx.Client, server: Server) -> None:
    names = {"/txt/embed": "input", "/embed": "items", "/embed_texts": "texts"}
    body = json.dumps({names[path]: [words(400, seed) for seed in range(200)]}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    before, lines_before = scraped(client), server.log.read_text()
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
        connection.sendall(head.encode() + body)
        _wait_for(client, "embedder_queue_items", *range(150, 201))  # some may have been answered
    start = time.monotonic()
    after = _wait_for(client, "embedder_queue_items", 0)
    assert after["embedder_cancelled_items_total"] - before.get("embedder_cancelled_items_total", 0) > 100
    assert time.monotonic() - start < 5
    name = series("embedder_requests_total", {"route": path, "status": "499"})
    after = _wait_for(client, name, before.get(name, 0) + 1)  # soon after its items
    assert after.get('embedder_errors_total{code="invalid_request"}') == before.get(
        'embedder_errors_total{code="invalid_request"}'
    )
    assert "Traceback" not in server.log.read_text().removeprefix(lines_before)


@pytest.mark.slow
def test_services_of_one_user_count_separately(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also removes its folder. BentoML's own is shared by all services, and each start empties it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    name = 'embedder_requests_total{route="/txt/embed",status="200"}'
    servers = []
    try:
        for number in (1, 2):  # both of one BENTOML_HOME
            servers.append(start_server(tmp_path, model=str(random_checkpoint), device="cpu"))
            for _ in range(number):
                httpx.post(f"{servers[-1].url}/txt/embed", json={"input": "red"}, timeout=60).raise_for_status()
        for number, server in enumerate(servers, 1):
            with httpx.Client(base_url=server.url, timeout=60) as client:
                assert scraped(client)[name] == number
                assert scraped(client)["embedder_workers"] == 1
    finally:
        assert [server.stop() for server in servers] == [0] * len(servers)
    assert not list((tmp_path / "temporary").glob("*metrics*"))


def _wait_for(client: httpx.Client, name: str, *values: float) -> Numbers:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):  # of the connection to a worker that was killed
            if (numbers := scraped(client)).get(name) in values:
                return numbers
        time.sleep(0.1)
    raise AssertionError(f"{name} did not become one of {values}")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(["/embed"])


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def test_cancelled_and_failed_items_leave_the_queue(metrics: Metrics, gate: threading.Event) -> None:
    settings = Settings(max_batch_tokens=64, max_input_tokens=64, max_queued_tokens=4096)
    model = FakeModel(gate)
    engine = Engine(model.preprocess, model.launch, HIDDEN_SIZE, settings, observer=metrics)
    futures = [engine.submit(item(text)) for text in ("runs", "waits", "malformed", "bug", "infinite", "poison")]
    for index in (2, 3):
        assert isinstance(futures[index].exception(timeout=10), EmbedderError)
    waiting = parsed(metrics.exposition().decode())
    assert waiting["embedder_queue_items"] == 4
    assert waiting["embedder_queue_tokens"] == engine.pending_tokens > 0
    given_up = sum(future.cancel() for future in futures)
    gate.set()
    engine.close()
    numbers = parsed(metrics.exposition().decode())
    assert numbers["embedder_cancelled_items_total"] == given_up >= 1
    assert numbers["embedder_queue_items"] == numbers["embedder_queue_tokens"] == engine.pending_tokens == 0
    assert numbers['embedder_failed_items_total{code="invalid_request"}'] == 1
    assert numbers['embedder_preprocess_seconds_count{kind="text"}'] == 6  # also of those that failed there


def test_request_without_a_response_is_counted_as_disconnected(metrics: Metrics) -> None:
    async def gone(scope: Any, receive: Any, send: Any) -> None: ...

    async def run() -> None:
        await MetricsMiddleware(gone, metrics.http)({"type": "http", "path": "/embed"}, None, None)  # type: ignore[arg-type]
        metrics.http.write()

    asyncio.run(run())
    numbers = parsed(metrics.exposition().decode())
    assert numbers['embedder_requests_total{route="/embed",status="499"}'] == 1


def test_table_in_the_docs_names_every_metric_and_label(client: httpx.Client, metrics: Metrics) -> None:
    assert metrics.table() in REFERENCE
    for family in text_string_to_metric_families(client.get("/metrics").text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        (row,) = [row for row in metrics.table().splitlines() if f"| `{name}` | {family.type} |" in row]
        assert family.documentation in row
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels == {label for label in re.findall(r"`([a-z]+)`", row) if label in labels}
    families = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert len(families) == len(metrics.table().splitlines()) - 2


def expressions() -> dict[str, str]:
    """Of the dashboard's panels and of the alerts, by their titles, with the dashboard's variables filled in."""
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    asked = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    for group in yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]:
        asked |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return {title: asked[title].replace("$__rate_interval", "5m").replace("$instance", ".*") for title in asked}


@pytest.mark.parametrize("title", expressions())
def test_dashboard_and_alerts_use_metrics_that_exist(title: str, client: httpx.Client) -> None:
    """Names, labels and the values that labels are compared with; `instance`, `job` and `up` are Prometheus' own."""
    exposed: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            for label, value in {"": "", **sample.labels}.items():
                exposed[sample.name][label].add(value)
    nodes: list[Any] = []
    promql_parser.walk(promql_parser.parse(expressions()[title]), nodes.append)
    selectors = [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]
    assert selectors
    for selector in selectors:
        assert selector.name in {"up", *exposed}
        for matcher in selector.matchers.matchers:
            if matcher.name != "instance":
                assert matcher.name in exposed[selector.name]
                assert matcher.op == promql_parser.MatchOp.Re or matcher.value in exposed[selector.name][matcher.name]
    labels = {"instance"}.union(*(exposed[selector.name] for selector in selectors))
    for node in nodes:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            assert set(node.modifier.labels) <= labels
