"""Callers that ask for known items all the time, and compare each vector."""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.conftest import encoded, picture, words
from tests.inputs.hostile import gif_of_comments, videos

NUM_CALLERS = 64
TOLERANCE = 1e-5  # batches differ


def items() -> list[dict[str, Any]]:
    """Texts, pictures that are decoded in a thread and in a process, and a clip."""
    media = [("image", encoded(picture(64, 48, seed))) for seed in range(2)]
    media += [("image", gif_of_comments(picture(64, 64))), ("video", videos()["mp4"])]
    texts = [{"text": words(count, count)} for count in (1, 3, 20, 200)]
    return [*texts, *({kind: base64.b64encode(data).decode()} for kind, data in media)]


@dataclass(frozen=True)
class Answer:
    """`outcome`: ok, wrong, late, connection, or the code of an error. Times are those of `time.monotonic`."""

    sent_s: float
    ended_s: float
    outcome: str


@dataclass
class Callers:
    """64 callers of a service, each with at most one request at a time. `max_wait_s`: what a caller waits at most."""

    port: int
    max_wait_s: float
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._items = items()
        self._vectors = [self._ask_alone(item) for item in self._items]
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The callers ask during the block."""
        self.answers.clear()
        self._is_over.clear()
        threads = [threading.Thread(target=self._call, args=(number,)) for number in range(NUM_CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def outcomes(self) -> collections.Counter[str]:
        """How often each outcome was seen."""
        return collections.Counter(one.outcome for one in self.answers)

    def _ask_alone(self, item: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        status, results = _post(connection, [item])
        connection.close()
        assert status == 200, results
        return results["results"][0]["embedding"]

    def _call(self, number: int) -> None:
        draw = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.max_wait_s)
        while not self._is_over.is_set():
            chosen = draw.sample(range(len(self._items)), 2)
            sent_s = time.monotonic()
            try:
                status, body = _post(connection, [self._items[place] for place in chosen])
                outcome = self._judge(status, body, chosen)
            except TimeoutError:
                outcome = "late"
            except (OSError, http.client.HTTPException):
                outcome = "connection"
            ended_s = time.monotonic()
            self.answers.append(Answer(sent_s, ended_s, "late" if ended_s - sent_s > self.max_wait_s else outcome))
            if outcome != "ok":
                connection.close()
                self._is_over.wait(0.2)  # as a client does before it repeats a request
        connection.close()

    def _judge(self, status: int, body: dict[str, Any], chosen: list[int]) -> str:
        if status != 200:
            return str(body["error"]["code"])
        for place, result in zip(chosen, body["results"], strict=True):
            if "error" in result:
                return str(result["error"]["code"])
            if np.abs(np.subtract(result["embedding"], self._vectors[place])).max() > TOLERANCE:
                return "wrong"
        return "ok"


def _post(connection: http.client.HTTPConnection, chosen: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    connection.request("POST", "/embed", json.dumps({"items": chosen}), {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())
