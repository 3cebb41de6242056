"""All checks of a checkpoint, in this process or through a running service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedder.embedder import Embedder
from embedder.inputs.items import item_from_fields
from embedder.inputs.tokenizer_files import load_tokenizer
from embedder.verify.examples import Examples
from embedder.verify.http_service import Service, ServiceFault
from embedder.verify.probes import NUM_TEXT_PROBES, PROBES, TEXT_PROBES, Vector
from embedder.verify.published_checks import Published, wants_published
from embedder.verify.results import (
    MIN_FLOAT32_COSINE,
    MIN_IMAGE_COSINE,
    MIN_TEXT_COSINE,
    Check,
    check,
    cosine,
    cosine_check,
    lowest_cosine,
    min_cosine_for,
    min_cosine_to_others,
    not_checked,
    shorten,
)
from embedder.verify.transformers_reference import embed_with_transformers

DEFAULT_INSTRUCTION = "Represent the user's input."  # of the reference code
PROMPT_END = "<|im_end|>\n<|im_start|>assistant\n"  # the tokenizer may append special tokens to it
MAX_NORM_ERROR = 1e-4  # of a unit vector in float32


@dataclass(frozen=True)
class Reference:
    """The probes embedded in this process, by `Embedder` and by plain transformers.

    `transformers_vectors` is empty if transformers cannot load the checkpoint; `error` then says why.
    """

    info: Mapping[str, Any]
    token_ids: list[list[int]]
    prompt_end: str
    embedder_vectors: list[Vector]
    transformers_vectors: list[Vector]
    transformers_token_ids: list[list[int]]
    error: str


def verify(
    model: str,
    *,
    url: str = "",
    key: str = "",
    image: bytes | None = None,
    examples: Path | None = None,
    reranker: str = "",
    **options: Any,
) -> list[Check]:
    """Run all checks. Those that cannot run are listed with the reason.

    `model`: a checkpoint folder, a hub id, or `bundled`. `url`, `key`: a running service and its API key.
    `image`: demo.jpeg of the Qwen-VL assets. `examples`: `examples/` of the authors' repository. `reranker`: a
    checkpoint to compare with the published scores. `options`: `device`, `dtype`, `weights` and `max_pixels` of the
    models.

    Raises `ModelUnavailable`, `ServiceUnreachable`, and `InvalidRequest` if `examples` is not a folder.
    """
    checks: list[Check] = []
    reference = None
    published = Published(Examples(examples, image), wants_published(model, reranker, image, examples))
    if not url or model == "bundled" or Path(model).is_dir():
        with Embedder("" if model == "bundled" else model, **options) as embedder:
            if not url:
                checks += _check_properties(embedder, embedder.info())
            info, folder, vectors = embedder.info(), embedder.checkpoint.folder, embedder.embed(PROBES)
            inputs = [embedder.preprocessor(item_from_fields(item)) for item in PROBES]
        del embedder  # frees its weights before transformers loads them again
        token_ids = [[int(token_id) for token_id in item.input_ids] for item in inputs]
        reference = _reference(folder, info, token_ids, vectors)
    if url:
        return _check_service(Service(url, key), model, reference, published)
    checks += published.check_loaded(model, reranker, options)
    return [*checks, *_compare(None, reference), not_checked("service = library", "no --url was given")]


def _reference(folder: Path, info: Mapping[str, Any], token_ids: list[list[int]], vectors: list[Vector]) -> Reference:
    prompt = load_tokenizer(folder).decode(token_ids[0], skip_special_tokens=False)
    prompt_end = "".join(prompt.rpartition("<|im_end|>")[1:])
    try:
        by_transformers = embed_with_transformers(folder, info)
    except (OSError, ValueError) as error:  # the folder lacks a file that only transformers reads
        reason = f"transformers cannot load the checkpoint: {shorten(str(error))}"
        return Reference(info, token_ids, prompt_end, vectors, [], [], reason)
    return Reference(info, token_ids, prompt_end, vectors, *by_transformers, error="")


def _check_service(service: Service, model: str, reference: Reference | None, published: Published) -> list[Check]:
    checks: list[Check] = []
    try:
        info = service.info()
        served = str(info.get("model"))
        if "/" in model and reference is None:
            checks.append(check("model served", served.endswith(Path(model).name), served, model))
        checks += _check_properties(service, info)
        items = [item for item in TEXT_PROBES if "instruction" not in item]
        lowest = lowest_cosine(service.embed_texts([item["text"] for item in items]), service.embed(items))
        checks.append(cosine_check("/txt/embed = /embed", lowest, min_cosine_for(MIN_TEXT_COSINE, info)))
        checks += published.check_service(service, info)
        checks += _compare((service.embed(PROBES), info), reference)
    except ServiceFault as fault:
        checks.append(Check("responses", fault.message, "as in /openapi.json", "FAILED"))
    return checks


def _check_properties(subject: Embedder | Service, info: Mapping[str, Any]) -> list[Check]:
    """What holds for every checkpoint: unit length, prefixes as smaller dimensions, no influence of the batch."""
    batched = subject.embed(PROBES)
    hidden_size, dimensions = len(batched[0]), min(64, len(batched[0]))
    truncated = subject.embed(PROBES, dimensions=dimensions)
    single = [subject.embed([item])[0] for item in PROBES]
    reordered = subject.embed(PROBES[::-1])[::-1]
    norms = [float(np.linalg.norm(vector)) for vector in (*batched, *truncated)]
    norm = max(norms, key=lambda value: abs(value - 1))
    is_truncated = all(len(vector) == dimensions for vector in truncated)
    prefix = lowest_cosine(truncated, [vector[:dimensions] for vector in batched]) if is_truncated else 0.0
    texts, images = slice(NUM_TEXT_PROBES), slice(NUM_TEXT_PROBES, None)
    min_text, min_image = min_cosine_for(MIN_TEXT_COSINE, info), min_cosine_for(MIN_IMAGE_COSINE, info)

    def in_batch(kind: slice) -> float:
        return min(lowest_cosine(other[kind], batched[kind]) for other in (single, reordered))

    expected_size = info.get("hidden_size")
    return [
        check("hidden_size", hidden_size == expected_size, str(hidden_size), str(expected_size)),
        check("unit length", abs(norm - 1) <= MAX_NORM_ERROR, f"{norm:.6f}", f"1 ± {MAX_NORM_ERROR}"),
        cosine_check(f"{dimensions} dimensions = first values", prefix, min_image),
        *_check_instructions(subject, info, batched[0]),
        cosine_check("single = in a batch, text", in_batch(texts), min_text),
        cosine_check("single = in a batch, image", in_batch(images), min_image),
    ]


def _check_instructions(subject: Embedder | Service, info: Mapping[str, Any], plain: Vector) -> list[Check]:
    """Check that the prompt contains the instruction. Leaving it out is the most common fault of other servers."""
    instructions = (DEFAULT_INSTRUCTION, "Find it.", "Find it")
    default, custom, no_period = subject.embed([{"text": "red", "instruction": one} for one in instructions])
    minimum = min_cosine_for(MIN_TEXT_COSINE, info)
    change = cosine(plain, custom)
    is_changed = change < MIN_FLOAT32_COSINE
    checks = [
        check("instruction changes the vector", is_changed, f"{change:.6f}", f"< {MIN_FLOAT32_COSINE}"),
        cosine_check("instruction gets a final period", cosine(no_period, custom), minimum),
    ]
    configured = info.get("default_instruction", DEFAULT_INSTRUCTION)
    if configured != DEFAULT_INSTRUCTION:
        return [*checks, not_checked("default instruction", f"the service uses {configured!r}")]
    return [*checks, cosine_check("default instruction", cosine(default, plain), minimum)]


def _compare(served: tuple[list[Vector], Mapping[str, Any]] | None, reference: Reference | None) -> list[Check]:
    """Compare the library with plain transformers, and `served` (a service's vectors and info) with both."""
    if reference is None:
        names = ("prompt end", "token ids", "library = transformers", "service = library")
        return [not_checked(name, "MODEL is not a folder on this machine") for name in names]
    has_end = reference.prompt_end.startswith(PROMPT_END)
    checks = [check("prompt end", has_end, repr(reference.prompt_end), f"starts with {PROMPT_END!r}")]
    if reference.transformers_vectors:
        pairs = zip(reference.token_ids, reference.transformers_token_ids, strict=True)
        num_equal = sum(ours == theirs for ours, theirs in pairs)
        checks.append(check("token ids", num_equal == len(PROBES), f"{num_equal} equal", f"{len(PROBES)} equal"))
        checks += _compare_vectors(
            "library = transformers", reference.embedder_vectors, reference.transformers_vectors, reference.info
        )
    else:
        checks += [not_checked(name, reference.error) for name in ("token ids", "library = transformers")]
    if served:
        vectors, info = served
        coarser = min((reference.info, info), key=lambda one: min_cosine_to_others(MIN_TEXT_COSINE, one))
        checks += _compare_vectors("service = library", vectors, reference.embedder_vectors, coarser)
        if reference.transformers_vectors:
            checks += _compare_vectors("service = transformers", vectors, reference.transformers_vectors, coarser)
    return checks


def _compare_vectors(name: str, left: list[Vector], right: list[Vector], info: Mapping[str, Any]) -> list[Check]:
    n = NUM_TEXT_PROBES
    return [
        cosine_check(f"{name}, text", lowest_cosine(left[:n], right[:n]), min_cosine_to_others(MIN_TEXT_COSINE, info)),
        cosine_check(
            f"{name}, image", lowest_cosine(left[n:], right[n:]), min_cosine_to_others(MIN_IMAGE_COSINE, info)
        ),
    ]
