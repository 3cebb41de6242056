"""The threads that preprocess: what they report, and when they pause."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import embedder.engine.preprocess_workers
from embedder.engine.hang_watch import HangWatch
from embedder.engine.job import Job
from embedder.engine.observer import Observer, begin_trace
from embedder.engine.preprocess_workers import PreprocessWorkers
from embedder.errors import EmbedderError, EngineFailed, InvalidRequest, SystemLimitReached
from embedder.inputs.decoder import Decoder, NeedsProcess, ThreadDecoder
from embedder.inputs.decoder_process import ProcessDecoder
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.preprocess import ModelInput
from embedder.settings import Settings
from tests.fake_model import FakeModel, item, wait_until

JOB_BYTES = 10


class Recorder:
    """The engine's side: counts bytes of preprocessed jobs, and records failures."""

    def __init__(self, model: FakeModel, settings: Settings) -> None:
        self.lock = threading.RLock()
        self.scheduled: list[Job] = []
        self.failed: list[tuple[Job, EmbedderError]] = []
        self.fetched_in: list[str] = []
        self.failures: list[str] = []
        self.workers = PreprocessWorkers(
            self.lock,
            settings,
            self.fetch,
            model.preprocess,
            Observer().decoder_ended,
            schedule=self.schedule,
            fail=self.fail,
            watch=HangWatch(self.failures.append),
            on_failure=self.failures.append,
        )

    def fetch(self, item: EmbeddingItem, _: object) -> EmbeddingItem:
        self.fetched_in.append(threading.current_thread().name)
        return item

    def schedule(self, job: Job, wake: bool) -> None:
        with self.lock:
            self.workers.add_ready_bytes(JOB_BYTES)
            self.scheduled.append(job)

    def fail(self, job: Job, error: EmbedderError) -> None:
        self.failed.append((job, error))

    def put(self, *items: EmbeddingItem) -> list[Job]:
        jobs = [Job(one, object(), 30) for one in items]
        with self.lock:
            for job in jobs:
                job.trace = begin_trace(job.item, job.num_tokens)
                self.workers.put(job, time.monotonic())
        return jobs

    def end(self) -> None:
        with self.lock:
            self.workers.close()
        self.workers.join()


@pytest.fixture
def recorder(model: FakeModel) -> Iterator[Recorder]:
    recorder = Recorder(model, Settings(preprocess_threads=2, url_hosts="*"))
    yield recorder
    model.gate.set()
    recorder.end()


def test_preprocessed_job_is_scheduled_with_its_input(recorder: Recorder) -> None:
    (job,) = recorder.put(item("red"))
    wait_until(lambda: recorder.scheduled == [job])
    assert (job.model_input.num_tokens, job.trace.num_tokens) == (3, 3)


@pytest.mark.parametrize(
    ("text", "error"), [("malformed", InvalidRequest), ("bug", EngineFailed), ("limit", SystemLimitReached)]
)
def test_job_that_cannot_be_preprocessed_fails_with_its_error(
    text: str, error: type[EmbedderError], recorder: Recorder
) -> None:
    (job,) = recorder.put(item(text))
    wait_until(lambda: len(recorder.failed) == 1)
    assert recorder.failed[0][0] is job
    assert type(recorder.failed[0][1]) is error
    assert recorder.scheduled == []


def test_items_with_urls_have_threads_of_their_own(recorder: Recorder) -> None:
    recorder.put(EmbeddingItem((Image("https://example.org/red.png"),)))
    wait_until(lambda: len(recorder.fetched_in) == 1)
    recorder.put(item("red"))
    wait_until(lambda: len(recorder.fetched_in) == 2)
    assert [name.partition("-")[0] for name in recorder.fetched_in] == ["fetch", "preprocess"]


def test_long_texts_leave_the_other_threads_free(
    recorder: Recorder, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.engine.preprocess_workers, "LONG_CHARS", len("slow") - 1)
    model.gate.clear()
    recorder.put(*[item("slow")] * 5)
    recorder.put(*[EmbeddingItem((Text("a"),), instruction="long")] * 5)
    (short,) = recorder.put(item("red"))
    wait_until(lambda: recorder.scheduled == [short])
    wait_until(lambda: len(recorder.workers) == 9)  # the tenth has the thread of the long ones
    model.gate.set()
    wait_until(lambda: len(recorder.scheduled) == 11)


def test_discarded_job_is_not_preprocessed(recorder: Recorder, model: FakeModel) -> None:
    model.gate.clear()
    recorder.put(item("slow"), item("slow"))  # both threads wait in them
    wait_until(lambda: len(recorder.fetched_in) == 2)
    (discarded, kept) = recorder.put(item("discarded"), item("kept"))
    with recorder.lock:
        assert len(recorder.workers) == 2
        assert recorder.workers.discard(discarded)
        assert not recorder.workers.discard(discarded)
    model.gate.set()
    wait_until(lambda: kept in recorder.scheduled)
    assert "discarded" not in model.preprocessed


def test_workers_pause_while_preprocessed_items_fill_the_memory(
    recorder: Recorder, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.engine.preprocess_workers, "READY_BYTES", 5 * JOB_BYTES)
    recorder.put(*(item(f"text {index}") for index in range(20)))
    wait_until(lambda: len(recorder.scheduled) >= 5)
    time.sleep(0.05)  # in which more would be preprocessed
    assert len(recorder.scheduled) in (5, 6)  # the other thread may have been at one already
    for _ in range(20):
        with recorder.lock:
            recorder.workers.release_ready_bytes(JOB_BYTES)
    wait_until(lambda: len(recorder.scheduled) == 20)
    assert len(model.preprocessed) == 20


def test_item_is_passed_on_by_a_thread_that_is_not_done_with_it(
    recorder: Recorder, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread of these lingers, as one does that loses its CPU, while the next one takes the item."""

    def needs_process(item: EmbeddingItem, decoder: Decoder) -> ModelInput:
        refusals.append(type(decoder))
        if len(refusals) < 4:
            raise NeedsProcess
        return model.preprocess(item)

    def lingering(step: Callable[..., None]) -> Callable[..., None]:
        def linger(*arguments: object) -> None:
            step(*arguments)
            time.sleep(0.1)

        return linger

    refusals: list[type] = []
    workers = recorder.workers
    monkeypatch.setattr(workers, "_preprocess", needs_process)
    monkeypatch.setattr(workers, "preprocess_job", lingering(workers.preprocess_job))
    monkeypatch.setattr(workers, "_decode_job", lingering(workers._decode_job))
    (job,) = recorder.put(item("red"))
    wait_until(lambda: bool(recorder.scheduled or recorder.failures))
    assert recorder.scheduled == [job]
    assert refusals == [ThreadDecoder, *[ProcessDecoder] * 3]
    assert recorder.failures == []


@pytest.mark.parametrize("name", ["preprocess-", "decoder-"])
def test_end_of_a_thread_is_a_failure(
    name: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(recorder.workers, "preprocess_job" if name == "preprocess-" else "_decode_job", fail)
    recorder.put(item("red") if name == "preprocess-" else EmbeddingItem((Video(b"GIF89a"),)))
    wait_until(lambda: len(recorder.failures) == 1)
    assert re.fullmatch(rf"thread {name}\d ended with an unexpected error", recorder.failures[0])
    assert "RuntimeError: a bug" in caplog.text


def test_close_ends_the_threads(model: FakeModel) -> None:
    recorder = Recorder(model, Settings(preprocess_threads=3))
    recorder.end()
    assert not any(thread.is_alive() for thread in recorder.workers._threads)
