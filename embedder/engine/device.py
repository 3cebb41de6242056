"""Launches batches on the device, waits for their rows, and measures how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from embedder.engine.job import Job
from embedder.engine.observer import Batch
from embedder.engine.scheduler import Rate
from embedder.inputs.preprocess import ModelInput

Rows = Sequence[NDArray[np.float32]] | NDArray[np.float32]  # one row an item; those of one model have one length
WaitForRows = Callable[[], Rows]
Launch = Callable[[list[ModelInput]], WaitForRows]

INITIAL_SECONDS_PER_TOKEN = 0.0002  # until a batch was measured


class BatchAbandoned(Exception):
    """Nobody waits for an item of the batch anymore."""


@dataclass(frozen=True)
class InFlightBatch:
    """A batch that was launched. `wait_for_rows` raises the error if the launch failed."""

    jobs: list[Job]
    wait_for_rows: WaitForRows
    launched_s: float


class Device:
    """Calls `launch`, in the engine's device thread only. `is_wanted`: whether somebody waits for a job.

    `watched`: makes a context for the block in which a batch is launched or waited for.
    """

    def __init__(
        self,
        launch: Launch,
        is_wanted: Callable[[Job], bool],
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._launch = launch
        self._watched = watched
        self._launching: list[Job] = []
        self._is_wanted = is_wanted
        self._rate = Rate(INITIAL_SECONDS_PER_TOKEN)
        self._last_end_s = 0.0

    @property
    def seconds_per_token(self) -> float:
        """Measured over the last seconds."""
        return self._rate.seconds_per_token

    def launch(self, jobs: list[Job]) -> InFlightBatch:
        """Launch a batch. An error is raised later by `wait`, in the order of the batches."""
        launched_s = time.monotonic()
        self._launching = jobs
        try:
            with self._watched():
                wait_for_rows = self._launch([job.model_input for job in jobs])
        except Exception as error:
            wait_for_rows = partial(_raise, error)
        finally:
            self._launching = []
        return InFlightBatch(jobs, wait_for_rows, launched_s)

    def stop_if_abandoned(self) -> None:
        """Raise `BatchAbandoned` if a batch is being launched and nobody waits for any of its items.

        For a `launch` that computes: it calls this between two layers. One wanted item keeps the batch.
        """
        if self._launching and not any(map(self._is_wanted, self._launching)):
            raise BatchAbandoned

    def wait(self, in_flight: InFlightBatch) -> tuple[Rows, Batch]:
        """Wait for a batch: a row for each item, and its measurements. Raises whatever made it fail."""
        try:
            with self._watched():
                rows = in_flight.wait_for_rows()
        finally:
            end_s = time.monotonic()
            start_s, self._last_end_s = max(in_flight.launched_s, self._last_end_s), end_s
        jobs = in_flight.jobs
        assert len(rows) == len(jobs)
        batch = Batch(len(jobs), sum(job.model_input.cost for job in jobs), start_s, end_s)
        self._rate.add(batch.num_tokens, batch.seconds)
        return rows, batch


def _raise(error: Exception) -> NoReturn:
    raise error
