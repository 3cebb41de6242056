"""Compares an embedding model and a reranker, in this process or in a service, with the published values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from embedder.embedder import Embedder
from embedder.errors import InvalidMedia
from embedder.inputs.regimes import RegimeName
from embedder.reranker import Reranker
from embedder.verify.examples import ExampleMissing, Examples, Input
from embedder.verify.http_service import Service
from embedder.verify.probes import Item, Vector
from embedder.verify.published import (
    EMBEDDINGS,
    PUBLISHED_MODEL,
    PUBLISHED_RERANKER,
    SCORES,
    FirstValues,
    Scores,
    Similarities,
    inputs_of,
)
from embedder.verify.results import Check, compared, cosine, not_checked, not_run

Example = Similarities | FirstValues | Scores
NOT_PUBLISHED = "the bundled model is not a published one"


class Scorer(Protocol):
    """A reranker, in this process or in a service."""

    def score(self, query: Any, documents: Iterable[Any], *, instruction: str | None = None) -> list[float]: ...


def wants_published(model: str, reranker: str, image: bytes | None, examples: Path | None) -> bool:
    """Whether the published values are asked for: by name, or by giving the inputs."""
    return PUBLISHED_MODEL in model or PUBLISHED_RERANKER in reranker or image is not None or examples is not None


@dataclass(frozen=True)
class Published:
    """The comparison with the published values. `is_wanted`: whether it was asked for; if not, it is only listed."""

    examples: Examples
    is_wanted: bool

    def check_loaded(self, model: str, reranker: str, options: Mapping[str, Any]) -> list[Check]:
        """Compare checkpoints in this process. Each is loaded once for each way of preprocessing."""
        if not self.is_wanted:
            return self._listed(model)
        embeddings: dict[str, Check] = {}
        scores: dict[str, Check] = {}
        for regime in get_args(RegimeName):
            chosen = {**options, "preprocessing": regime}
            with Embedder("" if model == "bundled" else model, **chosen) as embedder:
                embeddings |= check_published_embeddings(embedder, embedder.info(), self.examples)
            del embedder  # frees its weights
            if reranker and reranker != "bundled":
                with Reranker(reranker, **chosen) as judge:
                    scores |= check_published_scores(judge, judge.info(), self.examples)
                del judge
        no_reranker = NOT_PUBLISHED if reranker else "no reranker is named (--reranker or EMBEDDER_RERANKER)"
        return [*_complete(embeddings, EMBEDDINGS, ""), *_complete(scores, SCORES, no_reranker)]

    def check_service(self, service: Service, info: Mapping[str, Any]) -> list[Check]:
        """Compare a running service. It preprocesses in one way, in which only a part of the values was published."""
        if not self.is_wanted:
            return self._listed("")
        embeddings = check_published_embeddings(service, info, self.examples)
        reason = f"the service has EMBEDDER_PREPROCESSING={info.get('preprocessing')}; published with the other"
        judge = info.get("reranker", info) if "reranker" in info.get("roles", ()) else None
        if judge and not judge.get("is_bundled_model"):
            scores, not_scored = check_published_scores(service, judge, self.examples), reason
        else:
            scores, not_scored = {}, NOT_PUBLISHED if judge else "the service has no reranker"
        return [*_complete(embeddings, EMBEDDINGS, reason), *_complete(scores, SCORES, not_scored)]

    def _listed(self, model: str) -> list[Check]:
        rows = [_row_name(one) for one in (*EMBEDDINGS, *SCORES)]
        if model == "bundled":
            return [not_checked(row, NOT_PUBLISHED) for row in rows]
        return [not_run(row, "needs --examples FOLDER") for row in rows]


def check_published_embeddings(
    model: Embedder | Service, info: Mapping[str, Any], examples: Examples
) -> dict[str, Check]:
    """The rows, by name, of the examples that were published with the preprocessing in `info`."""
    vectors: dict[Input, Vector] = {}

    def embed(example: Example) -> Sequence[tuple[float, float]]:
        for one in inputs_of(example):
            if one not in vectors:
                vectors[one] = _embed(model, examples.item(one), one)
        if isinstance(example, FirstValues):
            return list(zip(vectors[example.input].tolist(), example.values, strict=False))
        assert isinstance(example, Similarities)
        return [(cosine(vectors[left], vectors[right]), value) for left, right, value in example.values]

    return _check_each(EMBEDDINGS, embed, info)


def check_published_scores(reranker: Scorer, info: Mapping[str, Any], examples: Examples) -> dict[str, Check]:
    """The rows, by name, of the reranker's examples that were published with the preprocessing in `info`."""

    def score(example: Example) -> Sequence[tuple[float, float]]:
        assert isinstance(example, Scores)
        documents = [examples.item(document) for document, _ in example.values]
        scores = reranker.score(examples.item(example.query), documents, instruction=example.instruction)
        return list(zip(scores, (value for _, value in example.values), strict=True))

    return _check_each(SCORES, score, info)


def _complete(rows: Mapping[str, Check], examples: Sequence[Example], reason: str) -> list[Check]:
    """All rows of `examples` in order; those that are not in `rows` are not checked, for `reason`."""
    return [rows.get(_row_name(one)) or not_checked(_row_name(one), reason) for one in examples]


def _row_name(example: Example) -> str:
    return f"published: {example.name}"


def _check_each(
    examples: Iterable[Example], compute: Callable[[Example], Sequence[tuple[float, float]]], info: Mapping[str, Any]
) -> dict[str, Check]:
    rows = {}
    for example in examples:
        if info.get("preprocessing", example.origin.regime) != example.origin.regime and _has_picture(example):
            continue
        origin, name = example.origin, _row_name(example)
        allowed = origin.allowed(str(info.get("weights") or info.get("dtype")))
        try:
            rows[name] = compared(name, compute(example), allowed, f"{origin.regime}, {origin.dtype}")
        except (ExampleMissing, InvalidMedia) as error:
            rows[name] = not_run(name, error.message)
    return rows


def _has_picture(example: Example) -> bool:
    return any(one.image for one in inputs_of(example))


def _embed(model: Embedder | Service, item: Item, one: Input) -> Vector:
    try:
        (vector,) = model.embed([item])
    except InvalidMedia as error:
        raise InvalidMedia(f"{one.image}: {error.message}") from error
    return vector
