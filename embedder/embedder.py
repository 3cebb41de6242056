"""`Embedder`: the engine with a loaded checkpoint, for Python programs and for the service."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import Future
from typing import Any, Literal, Self, cast, overload

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from embedder.engine.observer import Observer
from embedder.engine.postprocess import Embedding
from embedder.errors import ITEM_ERRORS, AttributedToItem, EmbedderError, InvalidRequest, recorded
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.inputs.python_items import PythonItem, is_single_item, item_from_python
from embedder.models import Models
from embedder.settings import Settings


class Embedder:
    """A loaded checkpoint that embeds text, images, videos and mixtures of them.

    `model`: a checkpoint folder or hub id; empty: the small model shipped in the package. `device`: a value of
    `EMBEDDER_DEVICE`. `options`: other fields of `Settings`, by name; `settings` replaces all of these arguments.
    `worker`: this process's number, from 0, which chooses its GPU if there are several. `observer` is called at each
    stage of an item. `on_failure` is called with the reason if the device fails; then this process can embed nothing
    more.

    Close it, or use it in a `with` block, to end its threads. Raises `ModelUnavailable`, and pydantic's
    `ValidationError` for settings out of range.
    """

    def __init__(
        self,
        model: str = "",
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        settings: Settings | None = None,
        worker: int = 0,
        observer: Observer | None = None,
        on_failure: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings or Settings(model=str(model or ""), device=device, dtype=dtype, **options)
        self.models = Models(
            self.settings.model_copy(update={"reranker": ""}),
            worker=worker,
            observer=observer,
            on_failure=on_failure,
        )
        loaded = self.models.embedder
        assert loaded is not None
        self.engine = self.models.engine
        self.device = self.models.device
        self.checkpoint = loaded.checkpoint
        self.preprocessor = loaded.preprocessor
        self.forward = loaded.forward

    @overload
    def embed(
        self,
        items: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        errors: Literal["raise"] = "raise",
        show_progress_bar: bool = False,
    ) -> list[NDArray[np.float32]]: ...

    @overload
    def embed(
        self,
        items: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        errors: Literal["return"],
        show_progress_bar: bool = False,
    ) -> list[NDArray[np.float32] | EmbedderError]: ...

    def embed(
        self,
        items: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        errors: Literal["raise", "return"] = "raise",
        show_progress_bar: bool = False,
    ) -> list[Any]:
        """Embed items: one vector per item, in order, each (dimensions,) float32.

        An item is a string, a `Path` to an image or video, a PIL image, an array (height, width, 3) uint8, an
        `EmbeddingItem`, or a mapping with `text`, `image` (one of the above, encoded bytes, base64, or a URL if
        `url_hosts` allows it), `video` (likewise, or a list of frames) or `content` (a list of parts in your order),
        and optionally `instruction`, `dimensions`, `normalize` and `truncate`. `instruction` and `dimensions` of this
        call apply to items that do not set their own. `dimensions` is from 64 to the model's hidden size, the default.
        Vectors have unit length, except with `normalize` false.

        Blocks while the queue is full, so a generator is read only as fast as its items are embedded. Raises the
        `EmbedderError` of the first item that fails, with its index; the items after it are cancelled. With `errors`
        "return", the result has the error in the place of the vector, and all other items are embedded.
        """
        if is_single_item(items):
            raise InvalidRequest(f"got a single {type(items).__name__}; allowed: a list of items, as in embed([item])")
        total = len(items) if isinstance(items, Sized) else None
        results: list[NDArray[np.float32] | EmbedderError] = []
        futures: deque[Future[Embedding]] = deque()  # of the items that follow those in `results`
        request = object()

        def take_first(progress: tqdm) -> None:
            with recorded(len(results), errors, results):
                results.append(futures[0].result().vector)
            futures.popleft()
            progress.update()

        try:
            with tqdm(total=total, unit="item", disable=not show_progress_bar) as progress:
                for index, item in enumerate(items):
                    futures.append(self._submit(item, index, instruction, dimensions, request, errors))
                    while futures and futures[0].done():
                        take_first(progress)
                while futures:
                    take_first(progress)
        finally:
            for future in futures:
                future.cancel()  # after an error
        return results

    def embed_query(
        self,
        queries: PythonItem | Sequence[PythonItem],
        *,
        dimensions: int | None = None,
        show_progress_bar: bool = False,
    ) -> NDArray[np.float32]:
        """Embed what a user searches with, under the published instruction for queries.

        One query -> (dimensions,); a list -> (num_queries, dimensions). Otherwise as `embed`.
        """
        return self._embed_array(queries, QUERY_INSTRUCTION, dimensions, show_progress_bar)

    def embed_document(
        self,
        documents: PythonItem | Sequence[PythonItem],
        *,
        dimensions: int | None = None,
        show_progress_bar: bool = False,
    ) -> NDArray[np.float32]:
        """Embed what is searched, under the default instruction.

        One document -> (dimensions,); a list -> (num_documents, dimensions). Otherwise as `embed`.
        """
        return self._embed_array(documents, None, dimensions, show_progress_bar)

    def info(self) -> dict[str, Any]:
        """The model, its sizes, the device and the limits, as `/info` reports them. Pixels are per image."""
        return self.models.info()

    def close(self) -> None:
        """Finish the submitted items and end the threads."""
        self.models.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(
        self,
        item: PythonItem,
        index: int,
        instruction: str | None,
        dimensions: int | None,
        request: object,
        errors: Literal["raise", "return"],
    ) -> Future[Embedding]:
        """The item's future. With `errors` "return", it also holds what makes an item invalid."""
        try:
            with AttributedToItem(index):
                return self.engine.submit(item_from_python(item, instruction, dimensions), request=request, wait=True)
        except ITEM_ERRORS as error:
            if errors == "raise":
                raise
            failed: Future[Embedding] = Future()
            failed.set_exception(error)
            return failed

    def _embed_array(
        self,
        items: PythonItem | Sequence[PythonItem],
        instruction: str | None,
        dimensions: int | None,
        show_progress_bar: bool,
    ) -> NDArray[np.float32]:
        """One item -> its vector; several -> a matrix."""
        is_single = is_single_item(items)
        rows = self.embed(
            cast("Sequence[PythonItem]", [items] if is_single else items),
            instruction=instruction,
            dimensions=dimensions,
            show_progress_bar=show_progress_bar,
        )
        matrix = np.stack(rows) if rows else np.empty((0, dimensions or self.forward.hidden_size), np.float32)
        return matrix[0] if is_single else matrix
