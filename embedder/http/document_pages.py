"""A document in a request -> the embeddings of its pages. Pages are rendered in confined processes, never here.

A request is admitted as a whole, as other requests are. Its pages are rendered one after the other while those before
them are embedded, and only a few rendered pages of all requests together are in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import PIL.Image

from embedder.documents.pages import DocumentReader, EncodedDocument
from embedder.engine.aio import Outcome, outcome
from embedder.engine.postprocess import Embedding
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

READERS = 2  # documents that are rendered at the same time; other requests wait for one of them
MAX_RENDERED_PAGES = 16  # of all requests, 4 MB each: a batch of the published models


class DocumentPages:
    """Renders and embeds the pages of documents, for all requests of a worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._readers = [_Reader(settings) for _ in range(READERS)]
        self._free: asyncio.Queue[_Reader] = asyncio.Queue()
        for reader in self._readers:
            self._free.put_nowait(reader)
        self._capacity = asyncio.Semaphore(MAX_RENDERED_PAGES)

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
        timeout_s = self._settings.request_timeout_s
        futures: list[Future[Embedding]] = []
        try:
            async with asyncio.timeout(timeout_s):
                async with self._reader() as reader, reader.opened(request.document) as num_pages:
                    await self._submit_pages(request, reader, num_pages, engine, regime, priority, futures)
                return [await outcome(future) for future in futures]
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"timeout: not done after {timeout_s:g} s, the limit for a request's items; send fewer pages"
            ) from error
        finally:
            for future in futures:
                future.cancel()  # has no effect on those that are done

    async def _submit_pages(
        self,
        request: DocumentPagesRequest,
        reader: _Reader,
        num_pages: int,
        engine: Engine,
        regime: Regime,
        priority: int,
        futures: list[Future[Embedding]],
    ) -> None:
        """Render the pages and submit each, with its future in `futures`; a page that fails is a failed future."""
        numbers = request.pages or tuple(range(1, num_pages + 1))
        if wrong := [number for number in numbers if number > num_pages]:
            raise InvalidRequest(f"pages: got {wrong[0]}; the document has pages 1 to {num_pages}")
        check_page_count(len(numbers), self._settings.max_document_pages)
        key, loop = object(), asyncio.get_running_loop()

        def release(_: Future[Embedding]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._capacity.release)

        with engine.reserve([request.item(EXAMPLE_IMAGE)] * len(numbers), priority) as reservation:
            for number in numbers:
                await self._capacity.acquire()
                with contextlib.ExitStack() as on_error:
                    on_error.callback(self._capacity.release)
                    try:
                        item = request.item(await reader.render(number, regime))
                        future = engine.submit(item, request=key, reservation=reservation)
                    except ITEM_ERRORS as error:
                        future = Future()
                        future.set_exception(without_traceback(error))
                    on_error.pop_all()
                futures.append(future)
                future.add_done_callback(release)

    @contextlib.asynccontextmanager
    async def _reader(self) -> AsyncIterator[_Reader]:
        """A reader that no other request uses in the block."""
        if not can_start_processes():
            raise InvalidRequest("document: this platform cannot confine the process that opens documents; use Linux")
        reader = await self._free.get()
        try:
            yield reader
        finally:
            self._free.put_nowait(reader)


class _Reader:
    """A process that opens documents, and the thread that speaks with it."""

    def __init__(self, settings: Settings) -> None:
        self._reader = DocumentReader(settings)
        self._thread = ThreadPoolExecutor(1, "documents")  # the process ends with the thread that has started it
        self._document = EncodedDocument(b"")

    def close(self) -> None:
        """End the process, after what it is doing, and the thread."""
        self._thread.shutdown()
        self._reader.close()  # here: at the limit on processes, no thread can be started that was not needed before

    @contextlib.asynccontextmanager
    async def opened(self, base64: str) -> AsyncIterator[int]:
        """Open a document for the block. Yields its number of pages."""
        self._document = document = await self._run(lambda: EncodedDocument(_decode(base64)))
        try:
            yield await self._run(lambda: self._reader.count_pages(document))
        finally:
            self._document = EncodedDocument(b"")
            self._thread.submit(self._reader.forget, document)

    async def render(self, number: int, regime: Regime) -> PIL.Image.Image:
        """A page of the open document."""
        document = self._document
        return await self._run(lambda: self._reader.render(document, number, regime).image)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _decode(base64: str) -> bytes:
    """The bytes of a document, in base64, bare or as a data URI. Raises `InvalidMedia`."""
    parts = split_data_uri(base64)
    try:
        return decode_base64(parts[2] if parts else base64)
    except ValueError as error:
        raise InvalidMedia(f"document is not valid base64 ({error}); starts with {base64[:20]!r}") from error
