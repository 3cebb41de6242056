"""Search an output of `python -m embedder.bulk` by a question, by a picture, or by both.

The query is embedded by the model that EMBEDDER_MODEL names, which must be the one that has embedded the output.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

try:
    from embedder.bulk.pages import FolderPages, is_clip
    from embedder.search.collection import Collection, Hit
    from embedder.search.serve import serve
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: pip install -e '.[bulk]'") from None

from embedder.embedder import Embedder
from embedder.errors import EmbedderError
from embedder.inputs.items import Video
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.inputs.regimes import Regime
from embedder.model.checkpoint import find_checkpoint
from embedder.reranker import Reranker
from embedder.search.snippet import find_snippet, printable
from embedder.settings import Settings

RERANKED_PER_RESULT = 3  # candidates that a reranker judges for each result that is shown
MIN_SNIPPET_CHARS, MAX_SNIPPET_CHARS = 20, 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.serve:
            serve(_open(options, Settings.from_environment()), Settings.from_environment(), options.host, options.port)
            return 0
        if not options.question and not options.image:
            raise ValueError("got no query; allowed: a question, --image, or both")
        if options.limit < 1:
            raise ValueError(f"--limit: got {options.limit}; allowed: 1 and more")
        hits = _find(options, Settings.from_environment())
    except (ValueError, OSError, EmbedderError) as error:
        parser.error(str(error))
    if options.json:
        print(orjson.dumps([_fields(hit, options.question) for hit in hits]).decode())
    else:
        print("\n".join(_table(hits, options.question, shutil.get_terminal_size((120, 24)).columns)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m embedder.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="OUTPUT of embedder.bulk")
    parser.add_argument("question", nargs="?", default="", help="what to search for")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to search by")
    parser.add_argument("--limit", type=int, default=10, help="number of results (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument(
        "--rerank", action="store_true", help="let the model that EMBEDDER_RERANKER names judge the best results again"
    )
    parser.add_argument("--serve", action="store_true", help="serve a page in which to search and look at the results")
    parser.add_argument("--host", default="127.0.0.1", help="address that --serve listens on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=3000, help="port of --serve (default: %(default)s)")
    return parser


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
    if options.rerank and not settings.reranker:
        raise ValueError("--rerank needs EMBEDDER_RERANKER: a reranker's checkpoint folder or hub id")
    collection = _open(options, settings)
    if options.rerank and collection.folder is None:
        raise ValueError("--rerank: the output does not say which folder it was made of; it is of an older version")
    query: dict[str, Any] = {"text": options.question} if options.question else {}
    if options.image:
        query["image"] = options.image
    limit = options.limit * RERANKED_PER_RESULT if options.rerank else options.limit
    hits = collection.search(_embed(query, collection, settings), limit)
    return _rerank(query, hits, collection, settings)[: options.limit] if options.rerank else hits


def _embed(query: dict[str, Any], collection: Collection, settings: Settings) -> NDArray[np.float32]:
    """The vector of the query. A picture by itself is embedded as the pictures of the output are."""
    instruction = QUERY_INSTRUCTION if "text" in query else collection.default_instruction
    with Embedder(settings=settings.model_copy(update={"reranker": ""})) as embedder:
        return embedder.embed([query], instruction=instruction, dimensions=collection.dimensions)[0]


def _rerank(query: dict[str, Any], hits: list[Hit], collection: Collection, settings: Settings) -> list[Hit]:
    assert collection.folder is not None
    pages = FolderPages(collection.folder, settings, collection.state)
    with Reranker(settings=settings) as reranker, contextlib.closing(pages):
        loaded = reranker.models.reranker
        assert loaded is not None
        regime = loaded.preprocessor.vision.regime
        documents = [_document(hit, collection.folder, pages, regime) for hit in hits]
        return [replace(hits[one.index], score=one.score) for one in reranker.rank(query, documents)]


def _document(hit: Hit, folder: Path, pages: FolderPages, regime: Regime) -> dict[str, Any]:
    """The page, picture or clip of a row, as an item. Raises `EmbedderError`."""
    if hit.page:
        return {"image": pages.render(hit.file, hit.page, regime).image}
    if is_clip(hit.file):
        return {"video": Video(pages.clip(hit.file), segment=hit.segment)}
    return {"image": folder / hit.file}


def _fields(hit: Hit, question: str) -> dict[str, Any]:
    snippet = find_snippet(hit.text, question, MAX_SNIPPET_CHARS)
    start_s, end_s = hit.segment or (None, None)
    place = {"page": hit.page or None, "start_s": start_s, "end_s": end_s}
    return {"id": hit.id, "file": hit.file, **place, "score": round(hit.score, 4), "snippet": snippet}


def _table(hits: Sequence[Hit], question: str, width: int) -> list[str]:
    """Aligned lines: score, file, page or seconds of a segment, snippet."""
    rows = [("score", "file", "seconds" if any(hit.segment for hit in hits) else "page")]
    rows += [(f"{hit.score:.4f}", printable(hit.file), hit.place) for hit in hits]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    num_chars = max(MIN_SNIPPET_CHARS, width - sum(widths) - 6)
    snippets = ["text", *(find_snippet(hit.text, question, num_chars) for hit in hits)]
    return [
        "  ".join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), snippet]).rstrip()
        for row, snippet in zip(rows, snippets, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
