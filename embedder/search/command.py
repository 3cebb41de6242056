"""The work of `python -m embedder.search`: embeds the query, searches, reranks, and prints the hits."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from embedder.embedder import Embedder
from embedder.errors import EmbedderError
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.model.checkpoint import find_checkpoint
from embedder.search.collection import Collection, Hit
from embedder.search.options import DEFAULT_CANDIDATES
from embedder.search.records import Records, text_of
from embedder.search.rerank import rerank
from embedder.search.serve import serve
from embedder.search.snippet import find_snippet, printable
from embedder.settings import Settings

MIN_SNIPPET_CHARS, MAX_SNIPPET_CHARS = 20, 200


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command and return its exit status. The parser reports what is wrong with its options."""
    try:
        settings = _settings(options)
        if options.serve:
            serve(_open(options, settings), settings, options.host, options.port)
            return 0
        _check(options)
        hits = _find(options, settings)
    except (ValueError, OSError, EmbedderError) as error:
        parser.error(str(error))
    if options.json:
        print(orjson.dumps([_fields(hit, options.question) for hit in hits]).decode())
    else:
        print("\n".join(_table(hits, options.question, shutil.get_terminal_size((120, 24)).columns)))
    for hit in hits:
        if isinstance(hit.reranked, EmbedderError):
            print(f"not reranked: {printable(hit.id)}: {printable(str(hit.reranked))}", file=sys.stderr)
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    """Those of the environment, with the reranker of --rerank; without that option, none. Raises `ValueError`."""
    settings = Settings.from_environment()
    if options.rerank is None:
        return settings.model_copy(update={"reranker": ""})
    if not options.rerank and not settings.reranker:
        raise ValueError("--rerank needs a checkpoint folder, a hub id or `bundled`, or EMBEDDER_RERANKER with one")
    model = settings.model or "bundled"  # next to a reranker, an empty name would mean no embedding model
    return settings.model_copy(update={"model": model, "reranker": options.rerank or settings.reranker})


def _check(options: argparse.Namespace) -> None:
    """Raises `ValueError` for options that are not allowed."""
    if not options.question and not options.image:
        raise ValueError("got no query; allowed: a question, --image, or both")
    if options.limit < 1:
        raise ValueError(f"--limit: got {options.limit}; allowed: 1 and more")
    if options.candidates is not None and options.rerank is None:
        raise ValueError("--candidates needs --rerank")
    if options.candidates is not None and options.candidates < options.limit:
        raise ValueError(f"--candidates: got {options.candidates}; allowed: {options.limit} (--limit) and more")


def _open(options: argparse.Namespace, settings: Settings) -> Collection:
    """The collection, which the model of the settings has embedded. Raises `ValueError` and `EmbedderError`."""
    collection = Collection(options.output)
    checkpoint = find_checkpoint(settings)
    model = f"{checkpoint.name} {checkpoint.revision}".strip()
    if model != collection.model:
        raise ValueError(f"the output was embedded by {collection.model}, but EMBEDDER_MODEL names {model}")
    return collection


def _find(options: argparse.Namespace, settings: Settings) -> list[Hit]:
    """Embed the query and search. Raises `ValueError` and `EmbedderError`."""
    collection = _open(options, settings)
    query: dict[str, Any] = {"text": options.question} if options.question else {}
    if options.image:
        query["image"] = options.image
    vector = _embed(query, collection, settings)
    if not settings.reranker:
        return _with_texts(collection.search(vector, options.limit), collection, settings)
    num_candidates = options.candidates or max(DEFAULT_CANDIDATES, options.limit)
    hits = rerank(query, collection.search(vector, num_candidates), collection, settings)
    return _with_texts(hits[: options.limit], collection, settings)


def _with_texts(hits: list[Hit], collection: Collection, settings: Settings) -> list[Hit]:
    """The hits, each with the text of its row, which the output has only of pages. Says what cannot be read anymore."""
    records = Records(collection, settings)
    if not records.exist:
        return hits
    items = records.read(hits)
    if reasons := {str(item): None for item in items if isinstance(item, EmbedderError)}:
        print("\n".join(f"without its text: {printable(reason)}" for reason in reasons), file=sys.stderr)
    return [
        hit if isinstance(item, EmbedderError) else replace(hit, text=text_of(item))
        for hit, item in zip(hits, items, strict=True)
    ]


def _embed(query: dict[str, Any], collection: Collection, settings: Settings) -> NDArray[np.float32]:
    """The vector of the query. A picture by itself is embedded as the pictures of the output are."""
    instruction = QUERY_INSTRUCTION if "text" in query else collection.default_instruction
    with Embedder(settings=settings) as embedder:
        return embedder.embed([query], instruction=instruction, dimensions=collection.dimensions)[0]


def _fields(hit: Hit, question: str) -> dict[str, Any]:
    snippet = find_snippet(hit.text, question, MAX_SNIPPET_CHARS)
    start_s, end_s = hit.segment or (None, None)
    place = {"page": hit.page or None, "start_s": start_s, "end_s": end_s}
    scores: dict[str, Any] = {"score": round(hit.score, 4)}
    if isinstance(hit.reranked, EmbedderError):
        scores |= {"rerank_score": None, "rerank_error": str(hit.reranked)}
    elif hit.reranked is not None:
        scores["rerank_score"] = round(hit.reranked, 4)
    return {"id": hit.id, "file": hit.file, **place, **scores, "snippet": snippet}


def _table(hits: Sequence[Hit], question: str, width: int) -> list[str]:
    """Aligned lines: the reranker's score if there is one, score, file, page or seconds of a segment, snippet."""
    rows = [("score", "file", "seconds" if any(hit.segment for hit in hits) else "page")]
    rows += [(f"{hit.score:.4f}", printable(hit.file), hit.place) for hit in hits]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    reranked = (
        ["rerank  ", *(f"{_shown(hit.reranked):6}  " for hit in hits)]
        if any(hit.reranked is not None for hit in hits)
        else []
    )
    num_chars = max(MIN_SNIPPET_CHARS, width - sum(widths) - 6 - len("".join(reranked[:1])))
    snippets = ["text", *(find_snippet(hit.text, question, num_chars) for hit in hits)]
    return [
        first + "  ".join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), snippet]).rstrip()
        for first, row, snippet in zip(reranked or [""] * len(rows), rows, snippets, strict=True)
    ]


def _shown(score: float | EmbedderError | None) -> str:
    return f"{score:.4f}" if isinstance(score, float) else "error"
