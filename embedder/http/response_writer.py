"""Writes response bodies: small ones in the event loop, the others in a thread.

As JSON, 2,048 vectors of 2,048 values take 0.1 s (one core of an AMD EPYC). `to_json` writes one vector after the
other, and between two of them another thread may have the interpreter.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from starlette.responses import Response

from embedder.engine.postprocess import Embedding
from embedder.http.dialects.dialect import Dialect, Outcomes, ServedModel

WRITTEN_AT_ONCE_VALUES = 2**15  # of all vectors: about 1 ms
VALUES_OF_ITEM = 2**7  # that take as long to write as an item without a vector


class ResponseWriter:
    """Writes the responses of the routes of one worker."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "write-response")  # one, as for reading bodies

    async def write(
        self, dialect: Dialect[Any], parsed: Any, outcomes: Outcomes, model: ServedModel
    ) -> bytes | Response:
        """The dialect's response to a request. Raises what the dialect raises."""
        respond = partial(dialect.respond, parsed, outcomes, model)
        num_values = sum([len(one.vector) for one in outcomes if isinstance(one, Embedding)])
        if num_values + VALUES_OF_ITEM * len(outcomes) <= WRITTEN_AT_ONCE_VALUES:
            return respond()
        return await asyncio.get_running_loop().run_in_executor(self._thread, respond)
