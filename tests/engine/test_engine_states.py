"""Any order of submits, cancels, failures and pauses: every future is resolved, and all capacity is released."""

from __future__ import annotations

from concurrent.futures import Future, wait

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from embedder.engine.cache import content_key
from embedder.engine.engine import Engine
from embedder.engine.postprocess import Embedding
from embedder.errors import DeviceFailed, EmbedderError, Overloaded, ShuttingDown
from embedder.settings import Settings
from tests.fake_model import HIDDEN_SIZE, FakeModel, item, unit

TEXTS = ["red", "green", "blue", "x" * 80, "malformed", "bug", "panic", "infinite", "poison"]

COMPUTED = [*TEXTS[:4], "infinite", "poison"]  # the others fail before


class EngineStates(RuleBasedStateMachine):
    """The state to compare with is a list of the submitted texts and their futures."""

    @initialize(
        cache_bytes=st.sampled_from([0, 1000, 1000]),
        never_fails=st.sampled_from([True, True, False]),
        max_in_flight=st.integers(1, 3),
    )
    def start(self, cache_bytes: int, never_fails: bool, max_in_flight: int) -> None:
        self.never_fails = never_fails
        self.model = FakeModel(capacity=100)
        self.model.gate.set()
        choice = Settings(
            preprocess_threads=2,
            max_queued_tokens=600,
            max_batch_tokens=256,
            max_input_tokens=256,
            cache_bytes=cache_bytes,
        )
        launch = self.model.launch if max_in_flight == 1 else self.model.launch_ahead
        self.engine = Engine(self.model.preprocess, launch, HIDDEN_SIZE, choice, max_in_flight=max_in_flight)
        self.submitted: list[tuple[str, Future[Embedding]]] = []

    @rule(text=st.sampled_from(TEXTS), request=st.sampled_from(["bulk", None]))
    def submit(self, text: str, request: str | None) -> None:
        try:
            self.submitted.append((text, self.engine.submit(item(text), request=request)))
        except Overloaded:
            assert self.engine.pending_tokens > 0
        except DeviceFailed:
            assert self.engine.failure

    @rule(
        place=st.integers(0, 29)
    )  # drawn from a fixed range, because the number of submitted items depends on the threads
    def cancel(self, place: int) -> None:
        if self.submitted:
            self.submitted[place % len(self.submitted)][1].cancel()

    @rule(is_open=st.booleans())
    def open_or_close_the_gate(self, is_open: bool) -> None:
        (self.model.gate.set if is_open else self.model.gate.clear)()

    @precondition(lambda self: not self.never_fails)
    @rule()
    def fail_the_device(self) -> None:
        self.submit("assert", None)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.model.gate.set()
        self.check_that_all_are_resolved()
        keys = [content_key(self.model.preprocess(item(text))) for text in COMPUTED]
        assert not any(map(self.engine._cache.is_awaited, keys))
        for text in sorted({text for text, _ in self.submitted}):  # which waits for no computation that has ended
            self.submit(text, None)
        self.check_that_all_are_resolved()
        self.engine.close()
        for text, future in self.submitted:
            if future.cancelled():
                continue
            if error := future.exception():
                assert isinstance(error, EmbedderError)
                assert self.engine.failure or text in TEXTS[4:]
            else:
                np.testing.assert_array_equal(future.result().vector, unit(text))
        assert (self.engine.pending_tokens, len(self.engine._pending)) == (0, 0)
        assert (len(self.engine._workers), len(self.engine._inputs)) == (0, 0)
        with pytest.raises((ShuttingDown, DeviceFailed)):
            self.engine.submit(item("late"))

    def check_that_all_are_resolved(self) -> None:
        assert not wait([future for _, future in self.submitted], timeout=10).not_done


EngineStates.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestEngineStates = EngineStates.TestCase
