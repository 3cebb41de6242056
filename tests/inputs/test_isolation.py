"""Hostile media in the engine: only their own items fail, and nobody else waits for them."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest

from embedder import Embedder
from embedder.engine.observer import Observer
from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.decoder_process import START_BYTES
from embedder.inputs.items import EmbeddingItem, Image, Text, Video
from embedder.inputs.tokens import item_ids
from tests.conftest import encoded, picture
from tests.fake_model import wait_until
from tests.inputs import hostile_clips
from tests.inputs.hostile import gif_of_comments
from tests.inputs.hostile_clips import hanging_clip
from tests.inputs.killed import kill_at
from tests.inputs.test_video import clip

TIMEOUT_S = 3.0


class Ends(Observer):
    """Counts the processes that were replaced."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def decoder_ended(self, reason: Any) -> None:
        self.reasons.append(reason)


ENDS = Ends()


@pytest.fixture(scope="module")
def two_threads(random_checkpoint: Path) -> Iterator[Embedder]:
    """An embedder with two preprocessing threads, three processes and a short deadline."""
    options = {"preprocess_threads": 2, "decode_timeout_s": TIMEOUT_S, "max_pixels": 16_384}
    with Embedder(str(random_checkpoint), device="cpu", observer=ENDS, **options) as embedder:
        yield embedder


@pytest.fixture(scope="module")
def patient(random_checkpoint: Path) -> Iterator[Embedder]:
    """An embedder whose deadline plays no role."""
    options = {"preprocess_threads": 2, "decode_timeout_s": 1000, "max_pixels": 16_384}
    with Embedder(str(random_checkpoint), device="cpu", **options) as embedder:
        yield embedder


def submit(embedder: Embedder, *parts: Any) -> Future[Any]:
    return embedder.engine.submit(EmbeddingItem(parts))


def decoders() -> list[psutil.Process]:
    """The decoding processes of this process that run."""
    found = []
    for one in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "decoder_worker" in " ".join(one.cmdline()):
                found.append(one)
    return found


@pytest.mark.slow
def test_pictures_and_texts_do_not_wait_for_clips_that_hang(two_threads: Embedder) -> None:
    hanging = [submit(two_threads, Video(hanging_clip())) for _ in range(3)]
    good = [
        submit(two_threads, Image(encoded(picture(64, 64, 1)))),
        submit(two_threads, Image(encoded(picture(64, 64, 2), "JPEG")), Text("red")),
        submit(two_threads, Text("red " * 1000)),
    ]
    for future in good:
        future.result(60)
    assert not any(future.done() for future in hanging)
    for future in hanging:
        with pytest.raises(MediaTooLarge, match=r"^decoding took more than 3 s \(EMBEDDER_DECODE_TIMEOUT_S\)"):
            future.result(60)


@pytest.mark.slow
def test_good_clip_has_its_vector_after_clips_that_hang(two_threads: Embedder) -> None:
    data = clip(num_frames=4)
    (expected,) = two_threads.embed([{"video": data}])
    hanging = [submit(two_threads, Video(hanging_clip())) for _ in range(4)]
    vector = submit(two_threads, Video(data)).result(60).vector
    assert np.abs(vector - expected).max() < 1e-6
    for future in hanging:
        with pytest.raises(MediaTooLarge):
            future.result(60)
    assert "deadline" in ENDS.reasons


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encoded(picture(64, 64)), id="in a thread", marks=pytest.mark.slow),
        pytest.param(gif_of_comments(picture(64, 64)), id="in a process"),
    ],
)
def test_small_picture_passes_large_ones(data: bytes, patient: Embedder) -> None:
    webp = encoded(PIL.Image.new("RGB", (2800, 2800)), "WEBP", lossless=True)
    with patient.engine.lock:  # so that all are there before the first is taken
        large = [submit(patient, Image(webp)) for _ in range(4)]
        small = submit(patient, Image(data))
    small.result(60)
    assert not all(future.done() for future in large)
    for future in large:
        future.result(60)


def test_processes_are_few_and_end_with_the_embedder(random_checkpoint: Path) -> None:
    before = {one.pid for one in decoders()}
    data = gif_of_comments(picture(64, 64))
    with Embedder(str(random_checkpoint), device="cpu", preprocess_threads=4) as embedder:
        assert {one.pid for one in decoders()} == before  # started when they are needed
        for _ in range(6):  # one after the other
            while len(embedder.engine._workers._idle) < 5:  # the process is still finishing the item before
                time.sleep(0.01)
            embedder.embed([{"image": data}])
        assert len({one.pid for one in decoders()} - before) == 1
        embedder.embed([{"image": data}] * 20)
        assert len({one.pid for one in decoders()} - before) <= 5
    assert {one.pid for one in decoders()} == before


def test_item_whose_process_is_killed_is_decoded_once_more(patient: Embedder) -> None:
    """The kernel kills it when memory is short: nothing may be wrong with the file."""
    processes = patient.engine._workers._processes
    num_items = sum(one._num_items for one in processes)
    future = submit(patient, Video(hanging_clip()))
    for number in (1, 2):
        wait_until(lambda number=number: sum(one._num_items for one in processes) == num_items + number)
        assert not future.done()
        for one in processes:
            if one._process:
                one._process.kill()
    with pytest.raises(InvalidMedia, match=r"^the decoder failed on this file \(status -9\)"):
        future.result(60)


def test_clip_whose_process_is_killed_is_counted_once_more(patient: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    item = EmbeddingItem((Video(clip(num_frames=20)),))
    expected = item_ids(item, patient.preprocessor)
    kills = kill_at(monkeypatch, "open")
    assert item_ids(item, patient.preprocessor) == expected
    assert kills


@pytest.mark.slow
def test_close_does_not_wait_for_a_cancelled_clip_that_hangs(random_checkpoint: Path) -> None:
    embedder = Embedder(str(random_checkpoint), device="cpu", preprocess_threads=1, decode_timeout_s=1000)
    embedder.embed([{"image": gif_of_comments(picture(64, 64))}])
    future = submit(embedder, Video(hanging_clip()))
    time.sleep(0.5)
    future.cancel()
    embedder.close()
    assert not any(thread.is_alive() for thread in embedder.engine._workers._threads)


@pytest.mark.slow
def test_random_hostile_clips_fail_alone_within_their_memory(two_threads: Embedder) -> None:
    chooser = random.Random(time.time_ns())
    good = {"video": clip(num_frames=20)}
    (expected,) = two_threads.embed([good])
    peak = 0
    stopped = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stopped.wait(0.02):
            for one in decoders():
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, one.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    end = time.monotonic() + 40
    while time.monotonic() < end:
        name, data = hostile_clips.random_clip(chooser, 0.3)
        bad = [submit(two_threads, Video(data)) for _ in range(2)]
        vector = submit(two_threads, Video(good["video"])).result(60).vector
        assert np.abs(vector - expected).max() < 1e-6, name
        for future in bad:
            error = future.exception(60)
            assert error is None or getattr(error, "status", 500) in (400, 413), (name, error)
    stopped.set()
    watcher.join()
    print(f"largest decoding process: {peak / 2**20:.0f} MiB")
    assert peak < 2**29 + START_BYTES + 2**27
