"""A checkpoint or a running service -> a table of what was checked, and an exit status.

    python -m embedder.verify MODEL [--url URL [--key-file FILE]] [--image demo.jpeg]

MODEL is a folder, a hub id, or `embedded`, the small model of the package. It is held to three things: what any
checkpoint must do, plain transformers on the same checkpoint (where that is on this machine), and the values
published for the 2B. With `--url` a service is asked, by HTTP alone, and compared with the same checkpoint here.
What cannot be checked is said to be so. Exit status: 0 nothing missed, 1 something missed, 2 nothing could be asked.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from embedder.embedder import Embedder
from embedder.errors import EmbedderError, InvalidRequest, ModelUnavailable
from embedder.http.messages import QUERY_INSTRUCTION
from embedder.inputs.items import item_from_fields
from embedder.inputs.preprocess import load_tokenizer
from embedder.torchvision_shim import declare_torchvision_operators

declare_torchvision_operators()

from qwen_vl_utils.vision_process import process_vision_info  # noqa: E402 - after the declaration
from transformers import Qwen3VLModel, Qwen3VLProcessor  # noqa: E402 - after the declaration

Vector = NDArray[np.float32]
Item = dict[str, Any]  # in the native form, fit for JSON: an image is base64

DEFAULT_INSTRUCTION = "Represent the user's input."  # the reference's own
TAIL = "<|im_end|>\n<|im_start|>assistant\n"  # and then what the tokenizer appends

# Least cosines. The first is float32 against float32; the others are what others ask of bfloat16.
FLOAT32_COSINE, TEXT_COSINE, IMAGE_COSINE = 0.99999, 0.9997, 0.997
MAX_LENGTH_ERROR = 1e-4  # of a unit vector, float32 on the wire

# Published for the 2B in bfloat16: items, their similarities, and the first values of the image's vector.
GOLDEN_MODEL = "Qwen3-VL-Embedding-2B"
GOLDEN_QUERY = "A woman playing with her dog on a beach at sunset."
GOLDEN_TEXT = (
    "A woman shares a joyful moment with her golden retriever on a sun-drenched beach at sunset, as the dog offers "
    "its paw in a heartwarming display of companionship and trust."
)
GOLDEN_SIMILARITIES = {
    ("query", "text"): 0.78962,
    ("query", "image"): 0.71558,
    ("query", "both"): 0.72365,
    ("text", "image"): 0.76503,
    ("text", "both"): 0.84729,
    ("image", "both"): 0.82388,
}
_FIRST_OF_DEMO = (
    "-0.07178 -0.01807 0.01001 -0.00555 -0.04956 0.11035 -0.03613 -0.02600 -0.00319 -0.00607 0.04053 0.02441 0.03857"
)
GOLDEN_VALUES = np.array([float(value) for value in _FIRST_OF_DEMO.split()])
MAX_SIMILARITY_ERROR = 0.01  # a choice: some bfloat16 steps (0.004 just below 1), far less than a lost prompt costs
# Three deviations of a value at a cosine of 0.997 in 2048 dimensions, sqrt(2 * 0.003 / 2048) = 0.0017.
MAX_VALUE_ERROR = 0.005


class ServiceUnreachable(EmbedderError):
    """No HTTP server answers at the address."""


class ServiceFault(EmbedderError):
    """The service answers, but not what its contract says."""


@dataclass(frozen=True)
class Check:
    """A row of the table. `verdict` is `ok`, `MISS`, or `not checked: ` and why."""

    name: str
    got: str
    wanted: str
    verdict: str


@dataclass(frozen=True)
class Reference:
    """What a checkpoint on this machine gives for the probes: `info` and token ids of ours, and vectors by origin.

    `plain` is empty where transformers could not be asked, and `why_not` says why.
    """

    info: Mapping[str, Any]
    token_ids: list[list[int]]
    tail: str
    library: list[Vector]
    plain: list[Vector]
    plain_token_ids: list[list[int]]
    why_not: str


def probe_picture(width: int, height: int, seed: int) -> str:
    """Smooth colors, as PNG in base64."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(values).resize((width, height), PIL.Image.Resampling.BILINEAR).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


TEXT_PROBES: list[Item] = [
    {"text": "red"},
    {"text": "red", "instruction": QUERY_INSTRUCTION},
    {"text": "\u732b\u306f\u8d64\u3044 \U0001f7e5 e\u0301\n\n- a list:\n"},
    {"text": f"{GOLDEN_TEXT}\n" * 5},
]
IMAGE_PROBES: list[Item] = [
    {"image": probe_picture(96, 64, 0)},
    {"image": probe_picture(333, 120, 1)},  # to be resized
    {"image": probe_picture(64, 96, 2), "text": "what the picture shows"},
]
PROBES = TEXT_PROBES + IMAGE_PROBES


class Service:
    """A running service, asked as any of its clients would. Has the two methods of `Embedder` that are needed here."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def info(self) -> Mapping[str, Any]:
        """What the service says of itself."""
        answer = self._ask("/info")
        if not isinstance(answer, dict):
            raise ServiceFault(f"/info answers {_short(answer)}; wanted: an object")
        return answer

    def embed(self, items: Iterable[Any], *, dimensions: int | None = None) -> list[Vector]:
        """Through `/embed`."""
        body = {"items": list(items)} | ({} if dimensions is None else {"dimensions": dimensions})
        answer = self._ask("/embed", body)
        return self._vectors("/embed", answer, lambda: [result["embedding"] for result in answer["results"]], body)

    def embed_texts(self, texts: Sequence[str]) -> list[Vector]:
        """Through `/txt/embed`."""
        answer = self._ask("/txt/embed", {"input": texts})
        return self._vectors("/txt/embed", answer, lambda: answer["embedding"], {"items": texts})

    def _vectors(self, path: str, answer: Any, read: Any, body: Mapping[str, Any]) -> list[Vector]:
        try:
            vectors = [np.array(vector, np.float32) for vector in read()]
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceFault(f"{path} answers {_short(answer)}; wanted: a vector for each item") from error
        if len(vectors) != len(body["items"]) or any(vector.ndim != 1 for vector in vectors):
            raise ServiceFault(f"{path} answers {len(vectors)} vectors to {len(body['items'])} items")
        return vectors

    def _ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - main lets no address through but http and https
            f"{self.url}{path}", data, self.headers
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:  # noqa: S310 - likewise
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise ServiceFault(f"{path} answers {error.code}: {_short(error.read())}") from error
        except ValueError as error:
            raise ServiceFault(f"{path} answers something else than JSON") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnreachable(f"{self.url}{path}: {error}") from error


def verify(
    model: str,
    *,
    url: str = "",
    key: str = "",
    image: bytes | None = None,
    max_pixels: int | None = None,
    **options: Any,
) -> list[Check]:
    """All checks that can be made, and the names of those that cannot.

    `key`: one that the service at `url` takes. `options`: device and dtype of the Embedder.

    Raises `ModelUnavailable`, `ServiceUnreachable`; `InvalidRequest` if `image` is not a picture.
    """
    is_here = not url or model == "bundled" or Path(model).is_dir()
    reference = None
    checks: list[Check] = []
    if is_here:
        name = "" if model == "bundled" else model
        with Embedder(name, max_pixels=max_pixels, **options) as library:
            if not url:
                checks += _own_checks(library, library.info())
                checks += _golden_checks(library, f"{model} {library.checkpoint.folder}", image)
            ours, info, folder = library.embed(PROBES), library.info(), library.checkpoint.folder
            inputs = [library.preprocessor(item_from_fields(item)) for item in PROBES]
        del library  # its weights, before transformers loads them again
        token_ids = [[int(one) for one in item.input_ids] for item in inputs]
        tail = load_tokenizer(folder).decode(token_ids[0], skip_special_tokens=False).rpartition("<|im_end|>")
        why_not = ""
        plain: tuple[list[Vector], list[list[int]]] = ([], [])
        try:
            plain = _embed_plainly(folder, info)
        except (OSError, ValueError) as error:  # a folder that lacks what only transformers reads
            why_not = f"transformers cannot load it: {_short(str(error))}"
        reference = Reference(info, token_ids, "".join(tail[1:]), ours, *plain, why_not)
    if not url:
        return [*checks, *_reference_checks(None, reference), _not_checked("service = library", "no --url was given")]
    return checks + _service_checks(Service(url, key), model, reference, image)


def _service_checks(service: Service, model: str, reference: Reference | None, image: bytes | None) -> list[Check]:
    checks: list[Check] = []
    try:
        info = service.info()
        served = str(info.get("model"))
        if "/" in model and reference is None:
            checks.append(_check("model served", served.endswith(Path(model).name), served, model))
        checks += _own_checks(service, info)
        plain = [item for item in TEXT_PROBES if "instruction" not in item]
        least = _least_cosine(service.embed_texts([item["text"] for item in plain]), service.embed(plain))
        checks.append(_cosine_check("/txt/embed = /embed", least, _bar(TEXT_COSINE, info)))
        checks += _golden_checks(service, f"{model} {served}", image)
        checks += _reference_checks((service.embed(PROBES), info), reference)
    except ServiceFault as fault:
        checks.append(Check("answers", fault.message, "as /openapi.json says", "MISS"))
    return checks


def _own_checks(subject: Embedder | Service, info: Mapping[str, Any]) -> list[Check]:
    """What any checkpoint must do."""
    together = subject.embed(PROBES)
    width, smallest = len(together[0]), min(64, len(together[0]))
    cut = subject.embed(PROBES, dimensions=smallest)
    alone = [subject.embed([item])[0] for item in PROBES]
    again = subject.embed(PROBES[::-1])[::-1]
    lengths = [float(np.linalg.norm(vector)) for vector in (*together, *cut)]
    worst = max(lengths, key=lambda length: abs(length - 1))
    is_cut = all(len(vector) == smallest for vector in cut)
    start = _least_cosine(cut, [vector[:smallest] for vector in together]) if is_cut else 0.0
    images = len(TEXT_PROBES)
    bar = _bar(IMAGE_COSINE, info)
    return [
        _check("width", width == info.get("hidden_size"), str(width), str(info.get("hidden_size"))),
        _check("unit length", abs(worst - 1) <= MAX_LENGTH_ERROR, f"{worst:.6f}", f"1 within {MAX_LENGTH_ERROR}"),
        _cosine_check(f"{smallest} dimensions are the first", start, bar),
        *_instruction_checks(subject, info, together[0]),
        _cosine_check(
            "alone = in a batch, text",
            min(_least_cosine(alone[:images], together[:images]), _least_cosine(again[:images], together[:images])),
            _bar(TEXT_COSINE, info),
        ),
        _cosine_check(
            "alone = in a batch, image",
            min(_least_cosine(alone[images:], together[images:]), _least_cosine(again[images:], together[images:])),
            bar,
        ),
    ]


def _instruction_checks(subject: Embedder | Service, info: Mapping[str, Any], plain: Vector) -> list[Check]:
    """The instruction is in the prompt: the commonest fault of servers is to leave the prompt out."""
    instructions = (DEFAULT_INSTRUCTION, "Find it.", "Find it")
    default, task, unfinished = subject.embed([{"text": "red", "instruction": one} for one in instructions])
    bar = _bar(TEXT_COSINE, info)
    change = _cosine(plain, task)
    checks = [
        _check("an instruction changes the vector", change < FLOAT32_COSINE, f"{change:.6f}", f"< {FLOAT32_COSINE}"),
        _cosine_check("an instruction gets its full stop", _cosine(unfinished, task), bar),
    ]
    own = info.get("default_instruction", DEFAULT_INSTRUCTION)
    if own != DEFAULT_INSTRUCTION:
        return [*checks, _not_checked("default instruction", f"it is set to {own!r}")]
    return [*checks, _cosine_check("default instruction", _cosine(default, plain), bar)]


def _reference_checks(asked: tuple[list[Vector], Mapping[str, Any]] | None, reference: Reference | None) -> list[Check]:
    """The library against plain transformers; and what a service gave, against both."""
    if reference is None:
        why = "MODEL is not a folder on this machine"
        return [
            _not_checked(name, why)
            for name in ("prompt tail", "token ids", "library = transformers", "service = library")
        ]
    has_tail = reference.tail.startswith(TAIL)
    checks = [_check("prompt tail", has_tail, repr(reference.tail), "the template's, then the tokenizer's")]
    if reference.plain:
        pairs = zip(reference.token_ids, reference.plain_token_ids, strict=True)
        same = sum(ours == theirs for ours, theirs in pairs)
        checks.append(_check("token ids", same == len(PROBES), f"{same} as transformers'", f"{len(PROBES)}"))
        checks += _pair("library = transformers", reference.library, reference.plain, reference.info)
    else:
        checks += [_not_checked(name, reference.why_not) for name in ("token ids", "library = transformers")]
    if asked:
        vectors, info = asked
        coarser = reference.info if reference.info["dtype"] != "float32" else info
        checks += _pair("service = library", vectors, reference.library, coarser)
        if reference.plain:
            checks += _pair("service = transformers", vectors, reference.plain, coarser)
    return checks


def _pair(name: str, ours: list[Vector], theirs: list[Vector], info: Mapping[str, Any]) -> list[Check]:
    images = len(TEXT_PROBES)
    return [
        _cosine_check(f"{name}, text", _least_cosine(ours[:images], theirs[:images]), _bar(TEXT_COSINE, info)),
        _cosine_check(f"{name}, image", _least_cosine(ours[images:], theirs[images:]), _bar(IMAGE_COSINE, info)),
    ]


def _golden_checks(subject: Embedder | Service, names: str, image: bytes | None) -> list[Check]:
    """The published values of the 2B: those of the texts, and with the published picture all of them."""
    rows = {pair: f"published: {' * '.join(pair)}" for pair in GOLDEN_SIMILARITIES}
    values = "published: first values of image"
    if GOLDEN_MODEL not in names:
        return [_not_checked(row, "not the published 2B") for row in (*rows.values(), values)]
    items: dict[str, Item] = {
        "query": {"text": GOLDEN_QUERY, "instruction": QUERY_INSTRUCTION},
        "text": {"text": GOLDEN_TEXT},
    }
    if image is not None:
        picture = base64.b64encode(image).decode()
        items |= {"image": {"image": picture}, "both": {"text": GOLDEN_TEXT, "image": picture}}
    found = dict(zip(items, subject.embed(items.values()), strict=True))
    checks = []
    for (one, other), wanted in GOLDEN_SIMILARITIES.items():
        if one in found and other in found:
            got = _cosine(found[one], found[other])
            is_near = abs(got - wanted) <= MAX_SIMILARITY_ERROR
            checks.append(_check(rows[one, other], is_near, f"{got:.5f}", f"{wanted} within {MAX_SIMILARITY_ERROR}"))
    if image is None:
        why = "needs --image, the demo.jpeg of the Qwen-VL assets"
        return [*checks, *(_not_checked(row, why) for row in (*list(rows.values())[len(checks) :], values))]
    first = found["image"][: len(GOLDEN_VALUES)]
    off = float(np.abs(first - GOLDEN_VALUES[: len(first)]).max())
    return [*checks, _check(values, off <= MAX_VALUE_ERROR, f"off by {off:.5f}", f"at most {MAX_VALUE_ERROR}")]


@torch.no_grad()
def _embed_plainly(folder: Path, info: Mapping[str, Any]) -> tuple[list[Vector], list[list[int]]]:
    """The probes through transformers alone, padded, as the reference code embeds; and their token ids."""
    dtype, device = getattr(torch, info["dtype"]), info["device"]
    processor = Qwen3VLProcessor.from_pretrained(folder, padding_side="right", local_files_only=True)
    model = Qwen3VLModel.from_pretrained(  # in eval mode already
        folder, dtype=dtype, device_map={"": device}, attn_implementation="sdpa", local_files_only=True
    )
    conversations = [_conversation(item, info) for item in PROBES]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    images, _ = process_vision_info(conversations, image_patch_size=16)
    inputs = processor(text=texts, images=images, padding=True, do_resize=False, return_tensors="pt").to(device)
    states = model(**inputs).last_hidden_state
    counts = inputs["attention_mask"].sum(1)
    vectors = states[torch.arange(len(PROBES), device=device), counts - 1].float().cpu().numpy()
    rows = zip(inputs["input_ids"].tolist(), counts.tolist(), strict=True)
    return [vector / np.linalg.norm(vector) for vector in vectors], [ids[:count] for ids, count in rows]


def _conversation(item: Item, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    limits = {"min_pixels": info["pixels"]["min"], "max_pixels": info["pixels"]["max"]}
    content: list[dict[str, Any]] = []
    if "image" in item:
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(item["image"])))
        content.append({"type": "image", "image": picture, **limits})
    if "text" in item:
        content.append({"type": "text", "text": item["text"]})
    instruction = item.get("instruction", info["default_instruction"])
    system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
    return [system, {"role": "user", "content": content}]


def _bar(bar: float, info: Mapping[str, Any]) -> float:
    return FLOAT32_COSINE if info.get("dtype") == "float32" else bar


def _cosine(one: Vector, other: Vector) -> float:
    """0 for vectors of different length, or without any."""
    if len(one) != len(other):
        return 0.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)


def _least_cosine(some: Sequence[Vector], others: Sequence[Vector]) -> float:
    return min(_cosine(one, other) for one, other in zip(some, others, strict=True))


def _check(name: str, is_met: bool, got: str, wanted: str) -> Check:
    return Check(name, got, wanted, "ok" if is_met else "MISS")


def _cosine_check(name: str, cosine: float, bar: float) -> Check:
    return _check(name, cosine >= bar, f"{cosine:.7f}", f">= {bar}")


def _not_checked(name: str, why: str) -> Check:
    return Check(name, "", "", f"not checked: {why}")


def _short(answer: object) -> str:
    text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
    return " ".join(text.split())[:160]


def table(checks: Sequence[Check]) -> str:
    """Rows in columns, and a line that counts them."""
    rows = [("check", "got", "wanted", "verdict"), *((one.name, one.got, one.wanted, one.verdict) for one in checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    ]
    num_ok, num_missed = (sum(one.verdict == verdict for one in checks) for verdict in ("ok", "MISS"))
    return "\n".join([*lines, f"{num_ok} ok, {num_missed} missed, {len(checks) - num_ok - num_missed} not checked"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m embedder.verify", description="Check a checkpoint or a running service; nothing is changed."
    )
    parser.add_argument("model", help="checkpoint folder, hub id, or `embedded`: the small model of the package")
    parser.add_argument("--url", default="", help="a running service that serves MODEL; asked by HTTP alone")
    parser.add_argument("--key-file", type=Path, help="its first line is sent as the service's API key")
    parser.add_argument("--image", type=Path, help="demo.jpeg of the Qwen-VL assets, for the published values")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, for what runs here")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--max-pixels", type=int, help="as EMBEDDER_MAX_PIXELS, for what runs here")
    chosen = vars(parser.parse_args(arguments))
    if chosen["url"] and not chosen["url"].startswith(("http://", "https://")):
        parser.error(f"--url: got {chosen['url']}; allowed: an address that starts with http:// or https://")
    try:
        path, key_file = chosen.pop("image"), chosen.pop("key_file")
        key = key_file.read_text(encoding="utf-8").partition("\n")[0].strip() if key_file else ""
        checks = verify(key=key, image=path.read_bytes() if path else None, **chosen)
    except (ModelUnavailable, ServiceUnreachable, InvalidRequest, OSError, ValueError) as error:
        parser.error(str(error))
    print(table(checks))
    return int(any(one.verdict == "MISS" for one in checks))


if __name__ == "__main__":
    sys.exit(main())
