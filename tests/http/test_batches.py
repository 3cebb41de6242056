"""OpenAI's files and batches: each line is answered once and in order, whatever ends a worker."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from embedder import Embedder
from embedder.engine.callers import EVERYONE
from embedder.errors import (
    DeadlineExceeded,
    DeviceFailed,
    InvalidMedia,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestTooLarge,
    ShuttingDown,
    StorageFailed,
)
from embedder.http.batches import runner as runner_module
from embedder.http.batches.routes import BatchRoutes, _checked
from embedder.http.batches.runner import LINES_AT_ONCE, MAX_STARTS, BatchRunner, Respond
from embedder.http.batches.store import BatchStore, check_folder
from embedder.settings import Settings
from tests.conftest import Server, start_server, words

OWNER, ENDPOINT = "0" * 32, "/v1/embeddings"
SETTINGS = Settings()


def line(name: str, body: Any = None, **fields: Any) -> bytes:
    whole = {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": {"input": name} if body is None else body}
    whole |= fields
    return json.dumps(whole).encode() + b"\n"


LINES = b"".join(line(f"line {index}") for index in range(3 * LINES_AT_ONCE + 5))


def test_folder_is_checked_before_the_start_without_a_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for usable in (tmp_path, tmp_path / "new" / "folder"):
        check_folder(str(usable))
    for wrong in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ValueError, match=f"^EMBEDDER_BATCH_FOLDER='{wrong}' cannot be used: "):
            check_folder(str(wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folder_without_permission_to_write_is_refused(tmp_path: Path) -> None:
    folder = Path("/proc/self") if os.geteuid() == 0 else tmp_path  # root may write wherever files can be made
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match=r"cannot be written to$"):
            check_folder(str(folder))
    finally:
        tmp_path.chmod(0o700)


async def echo(_: str, fields: Mapping[str, Any]) -> bytes:
    """The body again; an input that names an error fails so."""
    text = fields["input"]
    if text == "broken":
        raise InvalidMedia("image 0: not a picture")
    return json.dumps({"echo": text}).encode()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BatchStore:
    monkeypatch.setattr(runner_module, "POLL_S", 0.01)
    return BatchStore(tmp_path / "batches", 10**7, retention_s=1000)


def add(store: BatchStore, content: bytes = LINES, owner: str = OWNER, window_s: int = 1000) -> str:
    file = store.add_file(owner, content, "in.jsonl")
    return str(store.add_batch(owner, file["id"], ENDPOINT, "24h", window_s, {})["id"])


def run(
    store: BatchStore,
    respond: Respond = echo,
    pending: Callable[[], int] = lambda: 0,
    max_s: float = 30,
    settings: Settings = SETTINGS,
) -> None:
    """Run until all batches are finished, or until the task is cancelled by an error of `respond`."""

    def is_done() -> bool:
        return not store.unfinished()

    runner = BatchRunner(store, settings, respond=respond, num_pending=pending, is_stopping=is_done)
    asyncio.run(asyncio.wait_for(runner.run(), max_s))


def results(store: BatchStore, identifier: str, key: str = "output_file_id", owner: str = OWNER) -> list[Any]:
    file = store.batch(owner, identifier)[key]
    return [json.loads(one) for one in store.content(owner, file).read_bytes().splitlines()] if file else []


def test_each_line_is_answered_in_order_and_errors_have_a_file_of_their_own(store: BatchStore) -> None:
    content = (
        line("a") + b"\n" + line("b", {"input": "broken"}) + line("c").rstrip()
    )  # an empty line, and no last break
    identifier = add(store, content)
    run(store)
    batch = store.batch(OWNER, identifier)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    output, errors = results(store, identifier), results(store, identifier, "error_file_id")
    assert [(one["custom_id"], one["response"]["body"]) for one in output] == [
        ("a", {"echo": "a"}),
        ("c", {"echo": "c"}),
    ]
    assert [one["response"]["status_code"] for one in output] == [200, 200]
    (error,) = errors
    assert (error["custom_id"], error["response"]["status_code"]) == ("b", 400)
    assert error["response"]["body"]["error"]["message"] == "image 0: not a picture"
    assert store.file(OWNER, batch["output_file_id"])["purpose"] == "batch_output"


class Killed(BaseException):
    """The end of a worker."""


@pytest.mark.parametrize("moment", ["answer", "data", "journal", "record", "finish", "end"])
def test_batch_goes_on_where_a_worker_was_killed(
    moment: str, store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moment`: what the worker was doing, half done."""
    content = b"".join(line(str(index), {"input": "broken" if index % 3 else "fine"}) for index in range(50))
    identifier = add(store, content)
    answered = 0

    async def until_killed(path: str, fields: Mapping[str, Any]) -> bytes:
        nonlocal answered
        answered += 1
        if answered == 30 and moment in ("answer", "journal"):
            raise Killed
        return await echo(path, fields)

    with monkeypatch.context() as patch:
        if moment == "data":  # after the output of the second sixteen lines, before their errors
            killer = kill_at(3)
            patch.setattr(os, "fsync", lambda _: next(killer))  # the records exist, and are only replaced
        elif moment == "record":
            killer = kill_at(3)
            patch.setattr(store, "save_batch", lambda *_: next(killer))
        elif moment == "finish":
            killer = kill_at(1)
            patch.setattr(store, "_describe_file", lambda *_: next(killer))
        elif moment == "end":
            killer = kill_at(1)
            patch.setattr(store, "remove_marks", lambda *_: next(killer))
        with pytest.raises(Killed):
            run(store, until_killed)
    if moment == "journal":
        path = store.path(OWNER, identifier, "journal")
        path.write_bytes(path.read_bytes()[:-3])
    run(store)
    assert store.batch(OWNER, identifier)["request_counts"] == {"total": 50, "completed": 17, "failed": 33}
    output, errors = results(store, identifier), results(store, identifier, "error_file_id")
    assert [int(one["custom_id"]) for one in output] == [index for index in range(50) if index % 3 == 0]
    assert [int(one["custom_id"]) for one in errors] == [index for index in range(50) if index % 3]


def kill_at(count: int) -> Any:
    for _ in range(count - 1):
        yield None
    raise Killed


def test_line_that_ends_the_workers_fails_its_batch_only(store: BatchStore) -> None:
    async def kill(_: str, fields: Mapping[str, Any]) -> bytes:
        if fields["input"] == "poison":
            raise Killed
        return await echo(_, fields)

    identifier = add(store, line("fine") * 1 + line("poison"))
    other = add(store)
    for _ in range(MAX_STARTS):
        with pytest.raises(Killed):
            run(store, kill)
    run(store, kill)
    batch = store.batch(OWNER, identifier)
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "worker_ended")
    assert store.batch(OWNER, other)["status"] == "completed"


def test_worker_that_stops_in_order_does_not_count_as_ended(store: BatchStore) -> None:
    identifier = add(store)
    for error in (ShuttingDown("stop"), DeviceFailed("gone")) * MAX_STARTS:
        stopping = [False]

        async def stop(_: str, __: Mapping[str, Any], error: Exception = error, stopping: Any = stopping) -> bytes:
            stopping[0] = True
            raise error

        runner = BatchRunner(store, SETTINGS, respond=stop, num_pending=lambda: 0, is_stopping=partial(all, stopping))
        asyncio.run(asyncio.wait_for(runner.run(), 30))
    run(store)
    assert store.batch(OWNER, identifier)["status"] == "completed"


LOWER = SETTINGS.model_copy(update={"max_items_per_request": 1})


@pytest.mark.parametrize("damage", ["input", "limits", "journal", "record"])
def test_batch_that_cannot_go_on_fails_by_itself(
    damage: str, store: BatchStore, caplog: pytest.LogCaptureFixture
) -> None:
    """`damage`: what has changed since the worker stopped after a line."""
    identifier = add(store, LINES + line("long", {"input": "a", "other": list(range(1000))}))
    other = add(store, line("other"))
    input_file = store.batch(OWNER, identifier)["input_file_id"]

    async def stop(path: str, fields: Mapping[str, Any]) -> bytes:
        if fields["input"] == f"line {LINES_AT_ONCE}":
            raise Killed
        return await echo(path, fields)

    with pytest.raises(Killed):
        run(store, stop)
    if damage == "input":
        store.content(OWNER, input_file).with_suffix(".json").unlink()
    elif damage == "journal":
        store.path(OWNER, identifier, "journal").write_text("output many\n")
    elif damage == "record":
        store.path(OWNER, identifier, "json").write_bytes(b"")
    run(store, settings=LOWER if damage == "limits" else SETTINGS)
    assert store.batch(OWNER, other)["status"] == "completed"
    assert not store.unfinished()
    assert not [record for record in caplog.records if record.exc_info]
    if damage == "record":
        assert [one["id"] for one in store.batches(OWNER)] == [other]
        return
    batch = store.batch(OWNER, identifier)
    codes = {"input": "not_found", "limits": "request_too_large", "journal": "internal_error"}
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", codes[damage])
    num_done = {"input": LINES_AT_ONCE, "limits": 3 * LINES_AT_ONCE, "journal": LINES_AT_ONCE}[damage]
    assert len(results(store, identifier)) == num_done


def test_full_disk_is_waited_for(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    identifier = add(store)
    write, num_failed = runner_module._BatchRun.write, 0

    def fail_at_first(batch: Any, results: Any) -> None:
        nonlocal num_failed
        if num_failed < 2 * MAX_STARTS:
            num_failed += 1
            raise OSError(errno.ENOSPC, "no space left")
        write(batch, results)

    monkeypatch.setattr(runner_module._BatchRun, "write", fail_at_first)
    run(store)
    assert store.batch(OWNER, identifier)["status"] == "completed"
    assert num_failed == 2 * MAX_STARTS


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/files"),
        ("GET", f"/v1/files/file-{'0' * 24}/content"),
        ("POST", "/v1/batches"),
        ("POST", f"/v1/batches/batch_{'0' * 24}/cancel"),
    ],
)
def test_disk_that_fails_during_a_request_is_an_error_of_the_service(
    method: str, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "batches").touch()  # where a folder was
    store = BatchStore(tmp_path / "batches", 10**6, 3600)
    app = Starlette(routes=BatchRoutes(store, [ENDPOINT]).routes())
    body: dict[str, Any] = {"json": {"input_file_id": "file-0", "endpoint": ENDPOINT}}
    if path == "/v1/files":
        body = {"files": {"file": ("texts.jsonl", LINES)}, "data": {"purpose": "batch"}}
    with TestClient(app) as client, pytest.raises(StorageFailed, match="the service's log has the reason"):
        client.request(method, path, **(body if method == "POST" else {}))
    assert "a request for files or batches failed: [Errno 20] Not a directory" in caplog.text


@pytest.mark.parametrize(
    ("files", "purposes", "kind", "message"),
    [
        (2, ["batch"], InvalidRequest, "file: got 2; allowed: one"),
        (1, ["batch"] * 2, InvalidRequest, "purpose: got 2; allowed: one"),
        (60, ["batch"], RequestTooLarge, "a form of more than 51 parts; allowed: one file and 50 options"),
    ],
)
def test_a_form_has_one_file_and_one_purpose(
    files: int, purposes: list[str], kind: type[Exception], message: str, store: BatchStore
) -> None:
    app = Starlette(routes=BatchRoutes(store, [ENDPOINT]).routes())
    form = {"files": [("file", ("in.jsonl", LINES))] * files, "data": {"purpose": purposes}}
    with TestClient(app) as client, pytest.raises(kind, match=f"^{message}$"):
        client.post("/v1/files", **form)


def test_part_of_a_file_is_sent(store: BatchStore) -> None:
    app = Starlette(routes=BatchRoutes(store, [ENDPOINT]).routes())
    file = store.add_file(EVERYONE, LINES, "in.jsonl")
    with TestClient(app) as client:
        part = client.get(f"/v1/files/{file['id']}/content", headers={"range": "bytes=2-5,999999-"})
    assert (part.status_code, part.content) == (206, LINES[2:6])


def test_folder_that_cannot_be_read_is_tried_again(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    identifier = add(store)
    errors = iter([OSError(errno.EIO, "the disk failed")] * 3)
    remove_old = store.remove_old

    def fail_at_first() -> None:
        if error := next(errors, None):
            raise error
        remove_old()

    monkeypatch.setattr(store, "remove_old", fail_at_first)
    run(store)
    assert store.batch(OWNER, identifier)["status"] == "completed"
    assert next(errors, None) is None


def test_bug_fails_its_line_only(store: BatchStore, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(path: str, fields: Mapping[str, Any]) -> bytes:
        if fields["input"] == "bug":
            raise KeyError("a secret")
        return await echo(path, fields)

    identifier = add(store, line("bug") + line("fine"))
    run(store, fail)
    (error,) = results(store, identifier, "error_file_id")
    assert error["response"]["status_code"] == 500
    assert "secret" not in json.dumps(error)
    assert "bug" in caplog.text
    assert [one["custom_id"] for one in results(store, identifier)] == ["fine"]


def test_bug_of_the_runner_fails_one_batch_only(
    store: BatchStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a line whose response cannot be written."""
    write = runner_module.response_line

    def fail(line: Any, *arguments: Any) -> bytes:
        if line.custom_id == "bug":
            raise TypeError("not JSON")
        return write(line, *arguments)

    monkeypatch.setattr(runner_module, "response_line", fail)
    identifier, other = add(store, line("bug")), add(store)
    run(store)
    batch = store.batch(OWNER, identifier)
    assert (batch["status"], batch["errors"]["data"][0]["message"]) == ("failed", "internal error")
    assert f"bug: batch {identifier} fails" in caplog.text
    assert store.batch(OWNER, other)["status"] == "completed"


def test_batch_goes_on_at_the_limit_on_threads(store: BatchStore) -> None:
    """Requests occupy the other threads, and no more can be started."""
    is_over = threading.Event()
    previous = threading.stack_size()

    async def respond(endpoint: str, fields: Mapping[str, Any]) -> bytes:
        for _ in range(40):
            asyncio.get_running_loop().run_in_executor(None, is_over.wait, 10)
        threading.stack_size(2**47)  # more than any system has
        return await echo(endpoint, fields)

    def is_done() -> bool:
        if is_done := not store.unfinished():
            threading.stack_size(previous)
            is_over.set()
        return is_done

    identifier = add(store, line("a"))
    runner = BatchRunner(store, SETTINGS, respond=respond, num_pending=lambda: 0, is_stopping=is_done)
    try:
        asyncio.run(runner.run())
    finally:
        threading.stack_size(previous)
    assert store.batch(OWNER, identifier)["status"] == "completed"


@pytest.mark.parametrize("metadata", [{"\ud800": "a"}, {"a": "\udfff"}])
def test_metadata_is_text(metadata: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="metadata holds a lone surrogate"):
        _checked(metadata)
    assert _checked({"ä": "猫"}) == {"ä": "猫"}


def test_file_is_not_deleted_while_a_batch_of_it_is_added(store: BatchStore) -> None:
    with ThreadPoolExecutor(2) as threads:
        for _ in range(30):
            file = store.add_file(OWNER, line("a"), "in.jsonl")["id"]
            added = threads.submit(store.add_batch, OWNER, file, ENDPOINT, "24h", 1000, {})
            deleted = threads.submit(store.delete_file, OWNER, file)
            errors = [type(one.exception()) for one in (added, deleted)]
            assert errors in ([NotFound, type(None)], [type(None), InvalidRequest])


def test_lines_wait_while_requests_wait(store: BatchStore) -> None:
    waited: list[int] = []
    pending = iter([7, 3, 1])

    def num_pending() -> int:
        waited.append(next(pending, 0))
        return waited[-1]

    async def respond(path: str, fields: Mapping[str, Any]) -> bytes:
        assert waited[-1] == 0
        return await echo(path, fields)

    identifier = add(store, line("a"))
    run(store, respond, num_pending)
    assert waited == [7, 3, 1, 0]
    assert store.batch(OWNER, identifier)["status"] == "completed"


def test_full_queue_is_waited_for_and_a_timeout_is_tried_again(store: BatchStore) -> None:
    calls: list[str] = []

    async def respond(path: str, fields: Mapping[str, Any]) -> bytes:
        calls.append(fields["input"])
        if fields["input"] == "busy" and calls.count("busy") < 3:
            raise Overloaded("full", retry_after_s=0)
        if fields["input"] == "slow":
            raise DeadlineExceeded("late")
        return await echo(path, fields)

    identifier = add(store, line("busy") + line("slow"))
    run(store, respond)
    assert [one["custom_id"] for one in results(store, identifier)] == ["busy"]
    assert results(store, identifier, "error_file_id")[0]["response"]["status_code"] == 504
    assert (calls.count("busy"), calls.count("slow")) == (3, runner_module.MAX_TIMEOUTS)


FAULTY = {
    "empty": (b"\n \n", "empty_file"),
    "not JSON": (line("a") + b"{\n", "invalid_request"),
    "no id": (line("a") + line("b", custom_id=None), "invalid_request"),
    "id twice": (line("a") + line("a"), "invalid_request"),
    "lone surrogate": (line("a") + line("\ud800"), "invalid_request"),
    "other endpoint": (line("a", url="/v1/chat/completions"), "invalid_request"),
    "other method": (line("a", method="GET"), "invalid_request"),
    "no body": (line("a", []), "invalid_request"),
    "list": (b"[1]\n", "invalid_request"),
    "many values": (line("a", {"input": [0] * 200_000}), "request_too_large"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_file_with_a_fault_fails_before_any_line_runs(fault: str, store: BatchStore) -> None:
    async def never(_: str, __: Mapping[str, Any]) -> bytes:
        raise AssertionError

    content, code = FAULTY[fault]
    identifier = add(store, content)
    run(store, never)
    batch = store.batch(OWNER, identifier)
    assert batch["status"] == "failed"
    assert [one["code"] for one in batch["errors"]["data"]] == [code]
    assert batch["output_file_id"] is None


def test_cancelled_batch_keeps_the_lines_that_are_done(store: BatchStore) -> None:
    identifier = add(store)

    async def cancel_later(path: str, fields: Mapping[str, Any]) -> bytes:
        if fields["input"] == "line 3":
            assert store.cancel(OWNER, identifier)["status"] == "cancelling"
        return await echo(path, fields)

    run(store, cancel_later)
    assert store.batch(OWNER, identifier)["status"] == "cancelled"
    assert len(results(store, identifier)) == LINES_AT_ONCE
    with pytest.raises(InvalidRequest, match="is cancelled and cannot be cancelled"):
        store.cancel(OWNER, identifier)


def test_batch_expires(store: BatchStore) -> None:
    identifier = add(store, window_s=-1)
    run(store)
    assert store.batch(OWNER, identifier)["status"] == "expired"


def test_input_is_read_once_in_a_turn(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    raw_lines = runner_module.raw_lines
    monkeypatch.setattr(runner_module, "raw_lines", lambda path: (reads.append(path), raw_lines(path))[1])
    add(store)
    run(store)
    assert len(reads) == 1


def test_batches_take_turns(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "LINES_PER_TURN", LINES_AT_ONCE)
    order: list[str] = []

    async def respond(path: str, fields: Mapping[str, Any]) -> bytes:
        order.append(fields["input"])
        return await echo(path, fields)

    add(store)
    add(store, line("other"))
    run(store, respond)
    assert order.index("other") in (0, LINES_AT_ONCE)  # both are as old
    assert len(order) == len(set(order))


def test_another_worker_leaves_a_locked_batch_alone(store: BatchStore) -> None:
    identifier = add(store)
    with store.lock(OWNER, identifier) as is_free:
        assert is_free
        with pytest.raises(TimeoutError):
            run(store, max_s=0.5)
    run(store)
    assert store.batch(OWNER, identifier)["status"] == "completed"


def test_space_is_limited(store: BatchStore) -> None:
    with pytest.raises(RequestTooLarge, match="EMBEDDER_MAX_BATCH_BYTES"):
        store.add_file(OWNER, bytes(10**7 + 1), "x")

    num_lines = 0

    async def large(_: str, __: Mapping[str, Any]) -> bytes:
        nonlocal num_lines
        num_lines += 1
        return json.dumps({"vector": "0" * 10**6}).encode()

    for identifier in [add(store), add(store)]:
        run(store, large)
        batch = store.batch(OWNER, identifier)
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "request_too_large")
    assert num_lines == 2 * LINES_AT_ONCE  # a batch that has failed runs no more lines
    assert store.num_bytes() <= 10**7 + 10_000


def test_owners_see_their_own_files_only(store: BatchStore) -> None:
    identifier = add(store)
    file = store.files(OWNER)[0]["id"]
    for other in ("1" * 32, "everyone"):
        assert store.files(other) == store.batches(other) == []
        for read in (store.file, store.content, store.delete_file):
            with pytest.raises(NotFound, match="of this API key"):
                read(other, file)
        for read in (store.batch, store.cancel):
            with pytest.raises(NotFound):
                read(other, identifier)
        with pytest.raises(NotFound):
            store.add_batch(other, file, ENDPOINT, "24h", 60, {})


@pytest.mark.parametrize(
    "name", ["..", "../x", "file-" + "0" * 24 + "/..", "file-", "batch_" + "0" * 24, "file-" + "A" * 24, ""]
)
def test_names_that_are_no_ids_are_not_found(name: str, store: BatchStore) -> None:
    with pytest.raises(NotFound):
        store.content(OWNER, name)


def test_files_in_use_stay_and_old_ones_go(store: BatchStore) -> None:
    identifier = add(store, line("a"))
    file = store.batch(OWNER, identifier)["input_file_id"]
    with pytest.raises(InvalidRequest, match="is the input of the batch batch_"):
        store.delete_file(OWNER, file)
    store.retention_s = -10
    store.remove_old()
    assert store.file(OWNER, file)["bytes"] == len(line("a"))
    store.retention_s = 1000
    run(store)
    store.remove_old()
    assert len(store.files(OWNER)) == 2
    store.delete_file(OWNER, file)
    assert len(store.files(OWNER)) == 1
    damaged = store.path(OWNER, "file-" + "f" * 24, "json")
    damaged.write_bytes(b"")
    damaged.with_suffix(".jsonl").write_bytes(b"{}")
    store.remove_old()
    assert damaged.exists()
    store.retention_s = -10
    store.remove_old()
    assert store.files(OWNER) == store.batches(OWNER) == []
    assert not list(store.folder.glob("*/*"))


# The service, with OpenAI's client


def wait_for(client: openai.OpenAI, identifier: str) -> Any:
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(identifier)).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return batch


@pytest.mark.slow
def test_openai_client_gets_the_vectors_of_a_file_across_the_death_of_a_worker(
    random_checkpoint: Path, embedder: Embedder, tmp_path: Path
) -> None:
    texts = [f"text number {index}" for index in range(400)]
    content = b"".join(line(str(index), {"input": [text], "model": "any"}) for index, text in enumerate(texts))
    server = start_server(
        tmp_path,
        model=str(random_checkpoint),
        device="cpu",
        dtype="float32",
        workers="2",
        preprocess_threads="1",
        batch_folder=str(tmp_path / "batches"),
        api_key="first,second",
    )
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="first", max_retries=5)
        file = client.files.create(file=("texts.jsonl", content), purpose="batch")
        assert (file.filename, file.bytes) == ("texts.jsonl", len(content))
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"name": "test"}
        )
        kill_a_worker(server)
        batch = wait_for(client, batch.id)
        assert (batch.status, batch.request_counts.completed, batch.metadata) == ("completed", 400, {"name": "test"})
        lines = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
        assert [one["custom_id"] for one in lines] == [str(index) for index in range(400)]
        vectors = np.array([one["response"]["body"]["data"][0]["embedding"] for one in lines], np.float32)
        assert np.abs(vectors - embedder.embed([{"text": text} for text in texts])).max() < 1e-6
        assert [one.id for one in client.batches.list(limit=1)] == [batch.id]
        assert {one.id for one in client.files.list()} == {file.id, batch.output_file_id}
        other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="second", max_retries=0)
        assert list(other.files.list()) == []
        with pytest.raises(openai.NotFoundError):
            other.files.content(batch.output_file_id)
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.BadRequestError, match="allowed: /v1/embeddings"):
            client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.files.create(file=("texts.jsonl", content), purpose="fine-tune")
    finally:
        server.stop()


@pytest.mark.slow
def test_service_stops_while_lines_with_much_work_run(random_checkpoint: Path, tmp_path: Path) -> None:
    """And they run again after the next start."""
    options = {
        "model": str(random_checkpoint),
        "device": "cpu",
        "dtype": "float32",
        "batch_folder": str(tmp_path / "batches"),
    }
    text = words(6000)
    server = start_server(tmp_path, **options)
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=5)
        content = b"".join(line(str(index), {"input": [text] * 20}) for index in range(LINES_AT_ONCE))
        file = client.files.create(file=("texts.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        deadline = time.monotonic() + 30
        while "embedder_queue_items 0" in httpx.get(f"{server.url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        start_s = time.monotonic()
        server.process.terminate()
        assert server.process.wait(60) == 0
        assert time.monotonic() - start_s < 10
    finally:
        server.stop()
    server = start_server(tmp_path, **options)
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=5)
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    finally:
        assert server.stop() == 0


def kill_a_worker(server: Server) -> None:
    workers = [
        int(pid) for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    ]
    os.kill(workers[0], signal.SIGKILL)
