"""A document in a request -> the embeddings of its pages. Pages are rendered in confined processes, never here.

A request is admitted as a whole, as other requests are. Its pages are rendered one after the other while those before
them are embedded, and only a few rendered pages of all requests together are in memory. Requests take turns, of one
page each (`DocumentTurns`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import PIL.Image

from embedder.documents.pages import DocumentReader, EncodedDocument
from embedder.engine.aio import Outcome, outcome
from embedder.engine.callers import CALLER
from embedder.engine.postprocess import Embedding
from embedder.engine.scheduler import Scheduler
from embedder.errors import ITEM_ERRORS, DeadlineExceeded, InvalidMedia, InvalidRequest, without_traceback
from embedder.http.dialects.document import DocumentPagesRequest, check_page_count
from embedder.inputs.data_uri import decode_base64, split_data_uri
from embedder.inputs.decoder_process import can_start_processes
from embedder.inputs.items import EXAMPLE_IMAGE
from embedder.inputs.regimes import Regime
from embedder.settings import Settings

if TYPE_CHECKING:
    from embedder.engine.engine import Engine

Result = TypeVar("Result")

READERS = 2  # pages that are rendered at the same time
MAX_RENDERED_PAGES = 16  # of all requests, 4 MB each: a batch of the published models
FIRST_TURN_S = 0.1  # that a document's first turn is expected to take; another one, as long as the turn before it
MAX_TURN_S = 1.0  # that a turn is expected to take at most: documents with slower pages do not wait even longer


class DocumentPages:
    """Renders and embeds the pages of documents, for all requests of a worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._readers = [_Reader(settings) for _ in range(READERS)]
        self._turns = DocumentTurns(self._readers)

    def close(self) -> None:
        """End the processes and the threads."""
        for reader in self._readers:
            reader.close()

    async def embed(
        self, request: DocumentPagesRequest, engine: Engine, regime: Regime, priority: int = 0
    ) -> list[Outcome]:
        """Each page's embedding or error, in order.

        Raises the errors that concern the whole request: those of the document, and those of `embed_each`. `priority`:
        as for `embed_each`.
        """
        if not can_start_processes():
            raise InvalidRequest("document: this platform cannot confine the process that opens documents; use Linux")
        timeout_s = self._settings.request_timeout_s
        futures: list[Future[Embedding]] = []
        document = _Document(self._turns)
        try:
            async with asyncio.timeout(timeout_s):
                await self._submit_pages(request, document, engine, regime, priority, futures)
                document.close()
                return [await outcome(future) for future in futures]
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"timeout: not done after {timeout_s:g} s, the limit for a request's items; send fewer pages"
            ) from error
        finally:
            document.close()
            for future in futures:
                future.cancel()  # has no effect on those that are done

    async def _submit_pages(
        self,
        request: DocumentPagesRequest,
        document: _Document,
        engine: Engine,
        regime: Regime,
        priority: int,
        futures: list[Future[Embedding]],
    ) -> None:
        """Render the pages and submit each, with its future in `futures`; a page that fails is a failed future."""
        num_pages = await document.open(request.document)
        numbers = request.pages or tuple(range(1, num_pages + 1))
        if wrong := [number for number in numbers if number > num_pages]:
            raise InvalidRequest(f"pages: got {wrong[0]}; the document has pages 1 to {num_pages}")
        check_page_count(len(numbers), self._settings.max_document_pages)
        loop = asyncio.get_running_loop()

        def release(_: Future[Embedding]) -> None:
            _call_in(loop, self._turns.release_page)

        with engine.reserve([request.item(EXAMPLE_IMAGE)] * len(numbers), priority) as reservation:
            for number in numbers:
                try:
                    image = await document.render(number, regime)
                    with contextlib.ExitStack() as on_error:
                        on_error.callback(self._turns.release_page)
                        future = engine.submit(request.item(image), request=document, reservation=reservation)
                        on_error.pop_all()
                    future.add_done_callback(release)
                except ITEM_ERRORS as error:
                    future = Future()
                    future.set_exception(without_traceback(error))
                futures.append(future)


class _Document:
    """The document of one request, which waits for its turn before each page. Close it afterwards."""

    def __init__(self, turns: DocumentTurns) -> None:
        self._turns = turns
        self._encoded = EncodedDocument(b"")
        self._expected_s = FIRST_TURN_S
        self._used: set[_Reader] = set()

    async def open(self, base64: str) -> int:
        """Decode and open the document -> its number of pages."""

        def count_pages(reader: DocumentReader) -> int:
            self._encoded = EncodedDocument(_decode(base64))
            return reader.count_pages(self._encoded)

        num_pages = await self._run(count_pages)
        self._turns.release_page()
        return num_pages

    async def render(self, number: int, regime: Regime) -> PIL.Image.Image:
        """A page. It counts as rendered until `DocumentTurns.release_page`."""
        document = self._encoded
        return await self._run(lambda reader: reader.render(document, number, regime, with_text=False).image)

    async def _run(self, work: Callable[[DocumentReader], Result]) -> Result:
        reader = await self._turns.take(self, self._expected_s)
        self._used.add(reader)
        begin, loop = time.monotonic(), asyncio.get_running_loop()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._turns.release_page)
            done = reader.start(work)
            done.add_done_callback(lambda _: _call_in(loop, self._turns.give_back, reader))  # also if cancelled
            result = await asyncio.wrap_future(done)
            on_error.pop_all()
        self._expected_s = time.monotonic() - begin
        return result

    def close(self) -> None:
        """Free its bytes."""
        for reader in self._used:
            reader.forget(self._encoded)
        self._used.clear()
        self._encoded = EncodedDocument(b"")


class DocumentTurns:
    """Chooses which request gets a free reader, for one page: fair queueing of callers and their requests.

    A request is expected to take as long as its last turn. So one that has just arrived goes before those whose pages
    take long. A turn begins only if fewer than `MAX_RENDERED_PAGES` are in memory. For one event loop.
    """

    def __init__(self, readers: Sequence[_Reader]) -> None:
        self.num_free_pages = MAX_RENDERED_PAGES
        self._free = list(readers)
        self._waiting: Scheduler[asyncio.Future[_Reader]] = Scheduler(0, 0.001)  # of costs in milliseconds

    async def take(self, request: Hashable, expected_s: float) -> _Reader:
        """Wait for the request's turn. Afterwards, call `release_page` and `give_back`."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[_Reader] = loop.create_future()
        cost = 1 + round(1000 * min(expected_s, MAX_TURN_S))
        self._waiting.put(turn, cost, request, time.monotonic(), caller=CALLER.get())
        self._give()
        try:
            return await turn
        except asyncio.CancelledError:
            self._waiting.discard(turn)
            if not turn.cancelled():  # its turn began in the same step of the event loop
                self.release_page()
                self.give_back(turn.result())
            raise

    def give_back(self, reader: _Reader) -> None:
        """Use a reader for the next turn."""
        self._free.append(reader)
        self._give()

    def release_page(self) -> None:
        """Count one rendered page less."""
        self.num_free_pages += 1
        self._give()

    def _give(self) -> None:
        while self._free and self.num_free_pages and (turns := self._waiting.take(time.monotonic())):
            for turn in turns:
                if not turn.done():  # cancelled
                    self.num_free_pages -= 1
                    turn.set_result(self._free.pop())


class _Reader:
    """A process that opens documents, and the thread that speaks with it."""

    def __init__(self, settings: Settings) -> None:
        self._reader = DocumentReader(settings)
        self._thread = ThreadPoolExecutor(1, "documents")  # the process ends with the thread that has started it

    def close(self) -> None:
        """End the process, after what it is doing, and the thread."""
        self._thread.shutdown()
        self._reader.close()  # here: at the limit on processes, no thread can be started that was not needed before

    def start(self, work: Callable[[DocumentReader], Result]) -> Future[Result]:
        """Call `work` in the thread."""
        return self._thread.submit(work, self._reader)

    def forget(self, document: EncodedDocument) -> None:
        """Keep nothing of a document, after what the thread is doing."""
        self._thread.submit(self._reader.forget, document)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Let the event loop call a function, unless it is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _decode(base64: str) -> bytes:
    """The bytes of a document, in base64, bare or as a data URI. Raises `InvalidMedia`."""
    parts = split_data_uri(base64)
    try:
        return decode_base64(parts[2] if parts else base64)
    except ValueError as error:
        raise InvalidMedia(f"document is not valid base64 ({error}); starts with {base64[:20]!r}") from error
