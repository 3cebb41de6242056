"""`Reranker`: the engine with a loaded reranker, for Python programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

from embedder.engine.observer import Observer
from embedder.engine.postprocess import Embedding
from embedder.engine.ranking import best_first, sigmoid
from embedder.errors import EmbedderError, InvalidRequest, attributed_to_query, recorded
from embedder.inputs.items import EmbeddingItem
from embedder.inputs.pairs import Query, pair_with, part_of_pair
from embedder.inputs.preprocess import ModelInput
from embedder.inputs.python_items import PythonItem, is_single_item, item_from_python
from embedder.models import Models
from embedder.settings import Settings


@dataclass(frozen=True)
class Ranked:
    """A document's place in the list that was given, and its score: the probability that it answers the query."""

    index: int
    score: float


class Reranker:
    """A loaded checkpoint that judges how well documents answer a query.

    `model`: a checkpoint folder or hub id; empty: the small reranker shipped in the package. `device`: a value of
    `EMBEDDER_DEVICE`. `options`: other fields of `Settings`, by name; `settings` replaces all of these arguments.
    `observer` is called at each stage of an item. `on_failure` is called with the reason if the device fails; then this
    process can compute nothing more.

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
        settings = settings or Settings(reranker=str(model or "bundled"), device=device, dtype=dtype, **options)
        if not settings.reranker:
            raise InvalidRequest("got settings without a reranker; allowed: a folder, a hub id or `bundled`")
        self.settings = settings
        self.models = Models(
            settings.model_copy(update={"model": ""}), worker=worker, observer=observer, on_failure=on_failure
        )
        self.engine = self.models.engine

    @overload
    def score(
        self,
        query: PythonItem,
        documents: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        errors: Literal["raise"] = "raise",
    ) -> list[float]: ...

    @overload
    def score(
        self,
        query: PythonItem,
        documents: Iterable[PythonItem | EmbedderError],
        *,
        instruction: str | None = None,
        errors: Literal["return"],
    ) -> list[float | EmbedderError]: ...

    def score(
        self,
        query: PythonItem,
        documents: Iterable[PythonItem | EmbedderError],
        *,
        instruction: str | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """The probability, from 0 to 1, that each document answers the query, in the documents' order.

        The query and the documents are given as to `Embedder.embed`: texts, PIL images, or mappings with `text`,
        `image`, `video` or `content`. `instruction` describes the task; the default is the reference's.

        Raises the `EmbedderError` of the query, or of the first document that fails, with its index. With `errors`
        "return", the result has the error of a document in the place of its score. A document may also be given as the
        error that it has already had.
        """
        if is_single_item(documents):
            kind = type(documents).__name__
            raise InvalidRequest(
                f"documents: got a single {kind}; allowed: a list of items, as in score(query, [item])"
            )
        items: list[EmbeddingItem | EmbedderError] = []
        for index, document in enumerate(documents):
            with recorded(index, errors, items):
                if isinstance(document, EmbedderError):
                    raise document
                items.append(part_of_pair(item_from_python(document, None, None)))
        if not items:
            return []
        request = object()
        asked, prepared = self._prepare(query, instruction, len(items), request)
        futures: list[Future[Embedding] | EmbedderError] = []
        scores: list[float | EmbedderError] = []
        try:
            for index, item in enumerate(items):
                with recorded(index, errors, futures):
                    futures.append(self._submit(item, asked, prepared, request))
            for index, future in enumerate(futures):
                with recorded(index, errors, scores):
                    scores.append(future if isinstance(future, EmbedderError) else _score(future))
        finally:
            for future in futures:
                if isinstance(future, Future):
                    future.cancel()  # after an error
        return scores

    def rank(
        self,
        query: PythonItem,
        documents: Iterable[PythonItem],
        *,
        instruction: str | None = None,
        top_n: int | None = None,
    ) -> list[Ranked]:
        """The documents with their scores, the best first; of equal ones, the first given. `top_n`: how many.

        Arguments and errors are those of `score`.
        """
        scores = self.score(query, documents, instruction=instruction)
        return [Ranked(index, scores[index]) for index in best_first(scores)][:top_n]

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

    def _prepare(
        self, query: PythonItem, instruction: str | None, num_documents: int, request: object
    ) -> tuple[Query, ModelInput]:
        """The query, and what preprocessing makes of it."""
        with attributed_to_query():
            item = part_of_pair(item_from_python(query, None, None))
            asked = Query(item.parts, instruction, num_documents=num_documents)
            prepared: Any = self.engine.submit(asked, request=request, wait=True).result()
        return asked, prepared

    def _submit(
        self, item: EmbeddingItem | EmbedderError, asked: Query, prepared: ModelInput, request: object
    ) -> Future[Embedding] | EmbedderError:
        if isinstance(item, EmbedderError):
            return item
        return self.engine.submit(pair_with(asked, prepared, item), request=request, wait=True)


def _score(future: Future[Embedding]) -> float:
    return sigmoid(float(future.result().vector[0]))
