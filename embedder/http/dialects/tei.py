"""The routes of text-embeddings-inference: `POST /embed` with `inputs`, and `POST /similarity`.

Its clients also send both bodies to `POST /`, the root of a base URL, and to `/invocations`. `/embed` is also this
service's own route: a body with `inputs` is TEI's, one with `items` is ours. `/tokenize` and `/decode` are in `tokens`;
the fields of `/info` are added to this service's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, RootModel, StrictBool

from embedder.engine.postprocess import Embedding
from embedder.errors import InvalidRequest
from embedder.http.dialects.dialect import Dialect, ServedModel
from embedder.http.dialects.messages import item_from_string
from embedder.http.error_forms import PLAIN
from embedder.http.request_body import (
    AnyDimensions,
    NonEmptyList,
    RequestBody,
    check_item_count,
    parse_each,
    validate_body,
)
from embedder.http.response import to_json
from embedder.inputs.items import EmbeddingItem, describe_value, item_from_fields
from embedder.inputs.prompt import QUERY_INSTRUCTION
from embedder.settings import Settings

PROMPTS = {"query": QUERY_INSTRUCTION, "document": None, "passage": None}  # `prompt_name` -> instruction


class TeiOptions(RequestBody):
    """Options of TEI's routes. Unlike on this service's own routes, a text over the limit is an error by default."""

    truncate: StrictBool = Field(False, description="Cut a text over the limit; false: refuse it.")
    truncation_direction: Literal["Left", "Right"] = Field("Right", description="Which end is cut.")
    prompt_name: str | None = Field(None, description=f"One of {', '.join(PROMPTS)}; chooses the instruction.")

    def tei_item_options(self) -> dict[str, Any]:
        """The options of an item. Raises `InvalidRequest`."""
        name = self.prompt_name.lower() if self.prompt_name else None
        if name is not None and name not in PROMPTS:
            raise InvalidRequest(f"prompt_name: got {describe_value(self.prompt_name)}; allowed: {', '.join(PROMPTS)}")
        cut = "start" if self.truncation_direction == "Left" else "end"
        instruction = PROMPTS[name] if name else None
        return {"truncate": cut if self.truncate else "none", "instruction": instruction}


class TeiEmbedRequest(TeiOptions):
    """Body of `POST /embed` of TEI's clients."""

    inputs: str | NonEmptyList[str] = Field(description="Texts, or data URIs of images or videos.")
    normalize: StrictBool = Field(True, description="Divide the vector by its L2 norm.")
    dimensions: AnyDimensions = Field(None, description="Matryoshka size.")
    encoding_format: Literal["float"] | None = Field(None, description="Hugging Face's client has it; only float.")
    options: dict[str, Any] | None = Field(None, description="No effect. Weaviate's, of Hugging Face's own service.")


class TeiEmbedResponse(RootModel[list[list[float]]]):
    """Response of `POST /embed` to TEI's clients: one vector for each input."""


class Sentences(RequestBody):
    """What `/similarity` compares."""

    source_sentence: str
    sentences: NonEmptyList[str]


class SimilarityRequest(RequestBody):
    """Body of `POST /similarity`."""

    inputs: Sentences
    parameters: TeiOptions | None = None
    options: dict[str, Any] | None = Field(None, description="No effect.")


class SimilarityResponse(RootModel[list[float]]):
    """Response of `POST /similarity`: the cosine of each sentence with the source."""


@dataclass(frozen=True)
class TextsRequest:
    """A body as items."""

    items: tuple[EmbeddingItem, ...]


def parse_tei(body: Mapping[str, Any], settings: Settings) -> TextsRequest:
    """Body of `/embed` -> request. Raises `InvalidRequest` and `RequestTooLarge`."""
    request = validate_body(TeiEmbedRequest, body)
    options = {**request.tei_item_options(), "normalize": request.normalize, "dimensions": request.dimensions}
    inputs = request.inputs if isinstance(request.inputs, list) else [request.inputs]
    return TextsRequest(_items(inputs, options, settings))


def parse_similarity(body: Mapping[str, Any], settings: Settings) -> TextsRequest:
    """Body of `/similarity` -> request; the first item is the source. Raises as `parse_tei`."""
    request = validate_body(SimilarityRequest, body)
    options = (request.parameters or TeiOptions.model_validate({})).tei_item_options()
    return TextsRequest(_items([request.inputs.source_sentence, *request.inputs.sentences], options, settings))


def _items(inputs: Sequence[str], options: Mapping[str, Any], settings: Settings) -> tuple[EmbeddingItem, ...]:
    check_item_count(len(inputs), settings)
    return parse_each(inputs, lambda text: item_from_fields({**options, **item_from_string(text)}))


def vectors_response(_: TextsRequest, embeddings: Sequence[Embedding], __: ServedModel) -> bytes:
    """Embeddings -> response body."""
    return to_json([one.vector for one in embeddings])


def similarity_response(_: TextsRequest, embeddings: Sequence[Embedding], __: ServedModel) -> bytes:
    """Embeddings -> the cosines with the first of them."""
    source, *others = (one.vector for one in embeddings)
    return to_json([float(source @ other) for other in others])


def info_fields(model: ServedModel) -> dict[str, Any]:
    """TEI's fields of `/info`."""
    limits = model.info["limits"]
    return {
        "model_id": model.name,
        "model_sha": model.info["revision"] or None,
        "model_dtype": model.info["dtype"],
        "model_type": {"embedding": {"pooling": "last_token"}},
        "max_input_length": model.max_input_tokens,
        "max_client_batch_size": limits["max_items_per_request"],
        "auto_truncate": False,
    }


EMBED = Dialect(
    "/embed",
    "Embed, in the format of TEI's clients (a body with `inputs`)",
    TeiEmbedRequest,
    TeiEmbedResponse,
    parse_tei,
    vectors_response,
    examples={"TEI: texts": {"inputs": ["red", "green"], "truncate": True}},
    given="inputs",
    errors=PLAIN,
)
SIMILARITY = Dialect(
    "/similarity",
    "Compare a sentence with others, in the format of TEI's clients",
    SimilarityRequest,
    SimilarityResponse,
    parse_similarity,
    similarity_response,
    examples={"TEI: similarity": {"inputs": {"source_sentence": "red", "sentences": ["crimson", "a dog"]}}},
    given="inputs.source_sentence",
    errors=PLAIN,
)
# In an order in which the first whose field a body has is the right one.
SHARED = tuple(
    replace(dialect, path=path) for path in ("/embed", "/", "/invocations") for dialect in (SIMILARITY, EMBED)
)
