"""The route matrix: one content, on every route and client call that can carry it, is one vector or one error.

Each content is written once, in the native form; `ways` says how each route carries it, and the library gives the
expected result. The service cuts texts at 256 tokens, so that cutting is part of the matrix.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import bentoml
import httpx
import numpy as np
import PIL.Image
import pytest

from embedder import Embedder
from embedder.engine.postprocess import OutputDtype, dequantize, int8_step, quantize
from embedder.errors import EmbedderError
from embedder.http.dialects.dialect import by_path
from embedder.http.routes import DIALECTS
from tests.conftest import encoded, picture, slow_except, start_server, words
from tests.inputs.test_video import clip

SAME = 1e-6  # float32, one content on two routes or in two batches
LIMIT = 256  # tokens of one item


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PICTURES = {
    "PNG": encoded(picture(70, 50)),
    "JPEG": encoded(picture(64, 48, 1), "JPEG"),
    "WebP": encoded(picture(33, 65, 2), "WEBP"),
    "GIF": encoded(picture(40, 40, 3).convert("P"), "GIF"),
    "BMP": encoded(picture(20, 90, 4), "BMP"),
    "AVIF": encoded(picture(40, 60, 7), "AVIF"),
    "TIFF": encoded(picture(60, 40, 8), "TIFF", compression="tiff_lzw"),
    "ICO": encoded(picture(64, 64, 9), "ICO"),
    "HEIC": encoded(picture(70, 40, 10), "HEIF"),
    "motion photo": encoded(picture(64, 48, 1), "JPEG") + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\2\xff\xd8" * 9000,
    "transparent image": encoded(picture(50, 50, 5).convert("RGBA")),
    "gray image": encoded(picture(50, 50, 6).convert("L")),
    "truncated image": encoded(picture(99, 99))[:-300],
    "a PDF": b"%PDF-1.7 and so on",
    "empty image": b"",
    "1x1 image": encoded(picture(1, 1)),
    "1:500 image": encoded(picture(4, 2000)),
    "image over the pixel limit": encoded(PIL.Image.new("1", (9000, 9000))),  # 81 million pixels in few bytes
    "image over the token limit": encoded(picture(800, 800)),
}
PNG, JPEG = b64(PICTURES["PNG"]), b64(PICTURES["JPEG"])
TEXTS = {
    "text": "red",
    "text of many words": words(60),
    "Japanese": "\u7d05\u8272",
    "emoji": "\U0001f600 \U0001f1ef\U0001f1f5",
    "right to left": "\u0623\u062d\u0645\u0631",
    "combining": "e\u0301",
    "name of a special token": "<|im_end|>\n<|im_start|>system",
    "control characters": "a\x00b\x1b\x7f",
    "blank": " ",
    "newline": "\n",
    "JSON": '{"text": "red"}',
    "a URL": "https://example.com/red.png",
    "empty text": "",
    "text over the token limit": words(400),
    "text over the character limit": "x" * 200_001,
}
TEXT, IMAGE, OTHER = (
    {"type": "text", "text": "a swatch: "},
    {"type": "image", "image": PNG},
    {"type": "image", "image": JPEG},
)
CLIP = b64(clip(num_frames=30, width=64, height=64))
FRAMES = [b64(encoded(picture(48, 48, seed))) for seed in range(4)]
VIDEO = {"type": "video", "video": CLIP}
CONTENTS: dict[str, dict[str, Any]] = {
    **{name: {"text": text} for name, text in TEXTS.items()},
    **{name: {"image": b64(data)} for name, data in PICTURES.items()},
    "not base64": {"image": "it's red"},
    "a path": {"image": "/etc/hostname"},
    "encoded clip": {"video": CLIP},
    "encoded clip at 2 frames a second": {"video": CLIP, "fps": 2},
    "list of frames": {"video": FRAMES},
    "list of frames with one that is broken": {"video": [*FRAMES, "AAAA"]},
    "no clip": {"video": JPEG[:40]},
    "clip, image and text in the model's order": {"text": "a swatch", "image": PNG, "video": CLIP},
    "text and image": {"content": [TEXT, IMAGE]},
    "image and text": {"content": [IMAGE, TEXT]},
    "two images": {"image": [PNG, JPEG]},
    "text, two images, text": {"content": [TEXT, IMAGE, OTHER, {"type": "text", "text": "!"}]},
    "text and clip": {"content": [TEXT, VIDEO]},
    "clip and image": {"content": [VIDEO, IMAGE]},
    "text of a mixture over the token limit": {"content": [IMAGE, {"type": "text", "text": words(400)}]},
    "broken in a mixture": {"content": [TEXT, {"type": "image", "image": "AAAA"}]},
    "no content": {"content": []},
    "instruction": {"text": "red", "instruction": "Find it"},
    "blank instruction": {"text": "red", "instruction": " "},
    "instruction for an image": {"image": PNG, "instruction": "Find it"},
    "dimensions": {"text": "red", "dimensions": 100},
    "dimensions of an image": {"image": PNG, "dimensions": 64},
    "dimensions too small": {"text": "red", "dimensions": 0},
    "dimensions too large": {"image": PNG, "dimensions": 5000},
    **{f"truncate {how}": {"text": words(400), "truncate": how} for how in ("none", "start", "end")},
    "truncate none where it fits": {"text": "red", "truncate": "none"},
    "truncate start of a mixture": {
        "content": [IMAGE, {"type": "text", "text": words(400)}, OTHER],
        "truncate": "start",
    },
}

Send = Callable[[], Any]  # gives the vector, or the code of the error


@pytest.fixture(scope="module")
def url(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    server = start_server(folder, model=str(random_checkpoint), device="cpu", max_input_tokens=str(LIMIT))
    yield server.url
    assert server.stop() == 0


@pytest.fixture(scope="module")
def library(random_checkpoint: Path) -> Iterator[Embedder]:
    with Embedder(str(random_checkpoint), device="cpu", max_input_tokens=LIMIT) as library:
        yield library


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def bento(url: str) -> Iterator[bentoml.SyncHTTPClient]:
    with bentoml.SyncHTTPClient(url) as bento:
        yield bento


def chat_parts(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The item as parts of a chat message: images and encoded clips as data URIs."""
    parts = item.get("content")
    if parts is None:
        parts = [{"type": kind, kind: value} for kind, value in single_parts(item)]
        parts = [{**part, "fps": item["fps"]} if "fps" in item and "video" in part else part for part in parts]
    return [chat_part(part) for part in parts]


def single_parts(item: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Kinds and values in the order that the model sees: videos, images, texts."""
    if "video" in item:
        yield "video", item["video"]
    images = item.get("image", [])
    yield from (("image", image) for image in ([images] if isinstance(images, str) else images))
    if "text" in item:
        yield "text", item["text"]


def chat_part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text" or isinstance(part[kind], list):
        return part
    media = "image/png" if kind == "image" else "video/mp4"
    own = {name: part[name] for name in part if name not in ("type", kind)}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{media};base64,{part[kind]}"}, **own}


def ways(item: dict[str, Any], http: httpx.Client, bento: Any) -> dict[str, Send]:
    """Every request that can carry the item."""
    options = {name: item[name] for name in ("instruction", "dimensions", "truncate") if name in item}
    bare = {name: value for name, value in item.items() if name not in options}
    without_instruction = {name: value for name, value in options.items() if name != "instruction"}
    parts = chat_parts(item)
    system = [{"role": "system", "content": item["instruction"]}] if "instruction" in item else []
    conversation = [*system, {"role": "user", "content": parts}]

    def post(path: str, body: dict[str, Any]) -> Send:
        return lambda: outcome(path, http.post(path, json=body))

    found = {
        "native": post("/embed", {"items": [item]}),
        "native, options of the request": post("/embed", {"items": [bare], **options}),
        "Vertex AI": post("/predict", {"instances": [item]}),
        "Vertex AI, parameters": post("/predict", {"instances": [bare], "parameters": options}),
        "v1 object": post("/v1/embeddings", {"input": [item]}),
        "v1 content": post("/v1/embeddings", {"input": {"content": parts}, **options}),
        "v1 messages": post("/v1/embeddings", {"messages": conversation, **without_instruction}),
        "v1 conversations": post("/v1/embeddings", {"messages": [conversation], **without_instruction}),
    }
    if list(bare) in (["text"], ["image"]) and isinstance(value := next(iter(bare.values())), str):
        found |= local_ways(next(iter(bare)), value, options, post, http)
        found |= bentoml_ways(next(iter(bare)), item, bento)
    if list(bare) == ["text"]:
        found["v1 string"] = post("/v1/embeddings", {"input": item["text"], **options})
    elif len(bare) == len(parts) == 1 and "url" in str(parts[0]):  # one data URI
        (uri,) = (value["url"] for name, value in parts[0].items() if name != "type")
        found["v1 string"] = post("/v1/embeddings", {"input": uri, **options})
    found |= other_ways(item, options, post)
    return found | cohere_ways(item, parts, post) | mixture_ways(item, parts, options, post)


def upload_ways(value: str, options: dict[str, Any], http: httpx.Client) -> dict[str, Send]:
    """The image as a file, unless its base64 is broken."""
    try:
        data = base64.b64decode(value, validate=True)
    except ValueError:
        return {}
    path, form = "/img/embed", {"files": {"image": data}, "data": options}
    body = {"content": data, "params": options, "headers": {"content-type": "image/png"}}
    return {
        "form": lambda: outcome(path, http.post(path, **form)),
        "file": lambda: outcome(path, http.post(path, **body)),
    }


def local_ways(
    kind: str,
    value: str,
    options: dict[str, Any],
    post: Callable[[str, dict[str, Any]], Send],
    http: httpx.Client,
) -> dict[str, Send]:
    path = {"text": "/txt/embed", "image": "/img/embed"}[kind]
    synonyms = {"dim" if name == "dimensions" else name: option for name, option in options.items()}
    files = upload_ways(value, options, http) if kind == "image" else {}
    return files | {
        "local": post(path, {"input": value, **options}),
        "local list": post(path, {"inputs": [value], **options}),
        "local synonyms": post(path, {"contents": [value], **synonyms}),
    }


def bentoml_ways(kind: str, item: dict[str, Any], bento: Any) -> dict[str, Send]:
    def call(row: Any) -> Any:
        try:
            return getattr(bento, f"embed_{kind}s")(**{f"{kind}s": [row]})[0]
        except bentoml.exceptions.BentoMLException as error:
            (code,) = re.findall(r'"code":\s*"(\w+)"', str(error))
            return code

    found: dict[str, Send] = {"bentoml": lambda: call(item)}
    return found | ({"bentoml string": lambda: call(item[kind])} if list(item) == [kind] else {})


def cohere_ways(item: dict[str, Any], parts: list[Any], post: Callable[[str, dict[str, Any]], Send]) -> dict[str, Send]:
    """Cohere's route has no field for an instruction."""
    if "instruction" in item:
        return {}
    renamed = {"dimensions": "output_dimension", "truncate": "truncate"}
    options = {renamed[name]: value for name, value in item.items() if name in renamed}
    if "truncate" in options:
        options["truncate"] = options["truncate"].upper()
    found = {"v2 inputs": post("/v2/embed", {"inputs": [{"content": parts}], **options})}
    for kind in ("text", "image"):
        if isinstance(item.get(kind), str) and len(parts) == 1:
            found[f"v1 {kind}s"] = post("/v1/embed", {f"{kind}s": [item[kind]], **options})
            found[f"v2 {kind}s"] = post("/v2/embed", {f"{kind}s": [item[kind]], **options})
    return found


def other_ways(
    item: dict[str, Any], options: dict[str, Any], post: Callable[[str, dict[str, Any]], Send]
) -> dict[str, Send]:
    """Routes that take only strings: a text, or the data URI of an image."""
    kind = next(iter(item))
    if kind not in ("text", "image") or not isinstance(item[kind], str) or set(item) - {kind, *options}:
        return {}
    value = item["text"] if kind == "text" else f"data:image/png;base64,{item['image']}"
    how = options.get("truncate", "end")
    size = {"dimensions": options["dimensions"]} if "dimensions" in options else {}
    found = {
        "SageMaker": post("/invocations", {"input": [value], **options}),
        "pooling": post("/pooling", {"input": value, "task": "embed", **options}),
        "KServe": post(
            "/v2/models/any/infer",
            {"inputs": [{"name": kind, "shape": [1], "datatype": "BYTES", "data": [value]}], "parameters": options},
        ),
    }
    if "instruction" in options:
        return found
    direction = "Left" if how == "start" else "Right"
    tei = {"inputs": value, "truncate": how != "none", "truncation_direction": direction, **size}
    found |= {f"TEI {path}": post(path, tei) for path in ("/embed", "/", "/invocations")}
    if options.get("dimensions") != 0:  # 0 means all dimensions to the clients of infinity and Ollama
        found["infinity"] = post("/embeddings", {"input": value, "modality": kind, **options})
        if how != "start":
            found["Ollama"] = post("/api/embed", {"model": "any", "input": [value], "truncate": how != "none", **size})
    if not options and value:  # Ollama's clients send an empty prompt to load the model
        found["Ollama, old"] = post("/api/embeddings", {"model": "any", "prompt": value})
    return found


DASHSCOPE = "/api/v1/services/embeddings/multimodal-embedding/multimodal-embedding"


def mixture_ways(
    item: dict[str, Any], parts: list[Any], options: dict[str, Any], post: Callable[[str, dict[str, Any]], Send]
) -> dict[str, Send]:
    """Routes that take mixtures, but cut only the end of a text."""
    if options.get("truncate") == "start":
        return {}
    cut = options.get("truncate") != "none"
    found = {}
    if "instruction" not in options:
        size = {"output_dimension": options["dimensions"]} if "dimensions" in options else {}
        fields = {"inputs": [{"content": parts}], "truncation": cut, **size}
        found["Voyage"] = post("/v1/multimodalembeddings", fields)
    native = item.get("content") or [{kind: value} for kind, value in single_parts(item)]
    parameters = {"auto_truncation": cut, "enable_fusion": True, "instruct": options.get("instruction")}
    parameters |= {"dimension": options.get("dimensions"), "fps": item.get("fps")}
    if native:  # an empty list is another error there
        contents = [{name: value for name, value in part.items() if name != "type"} for part in native]
        found["DashScope"] = post(DASHSCOPE, {"input": {"contents": contents}, "parameters": parameters})
    return found


def outcome(path: str, response: httpx.Response) -> Any:
    """The vector, or the error's code."""
    body = response.json()
    if response.status_code != 200:
        for place in (body.get("error"), body):
            if isinstance(place, dict) and "code" in place:
                return place["code"]
        return body["error_type"]
    if isinstance(body, list):
        return body[0]
    match path:
        case "/v2/models/any/infer":
            return body["outputs"][0]["data"]
        case "/predict":
            return body["predictions"][0]
        case "/pooling":
            return body["data"][0]["data"]
        case "/embeddings" | "/invocations" | "/v1/multimodalembeddings":
            return body["data"][0]["embedding"]
        case "/api/embed" | "/v1/embed":
            return body["embeddings"][0]
    if path == DASHSCOPE:
        return body["output"]["embeddings"][0]["embedding"]
    match path:
        case "/embed":
            return body["results"][0]["embedding"]
        case "/v1/embeddings":
            return body["data"][0]["embedding"]
        case "/v2/embed":
            return body["embeddings"]["float"][0]
    return body["embedding"][0] if isinstance(body["embedding"][0], list) else body["embedding"]


MORE_FORMATS = ("BMP", "GIF", "ICO", "TIFF", "WebP", "gray image", "motion photo", "transparent image")


@pytest.mark.parametrize("name", slow_except(CONTENTS, *(set(CONTENTS) - set(MORE_FORMATS))))
def test_content_is_the_same_on_every_route_that_can_carry_it(
    name: str, http: httpx.Client, bento: Any, library: Embedder
) -> None:
    expected: Any
    try:
        (expected,) = library.embed([CONTENTS[name]])
    except EmbedderError as error:
        expected = error.code
    for way, send in ways(CONTENTS[name], http, bento).items():
        got = send()
        if isinstance(expected, str):
            assert got == expected, way
        else:
            assert not isinstance(got, str), (way, got)
            assert np.abs(np.array(got, np.float32) - expected).max() <= SAME, way


def test_matrix_has_every_path_that_embeds() -> None:
    sent = set()

    class Recorder:
        def post(self, path: str, **_: Any) -> Any:
            sent.add((path, next((one.given for one in paths[path] if one.given in _.get("json", {})), "")))
            return httpx.Response(400, json={"error": {"code": "recorded"}})

    paths = by_path([dataclasses.replace(one, path=one.path.replace("{model}", "any")) for one in DIALECTS])
    for content in CONTENTS.values():
        for way, send in ways(content, Recorder(), None).items():  # type: ignore[arg-type]
            if not way.startswith("bentoml"):
                send()
    every = {(path, one.given) for path, dialects in paths.items() for one in dialects}
    source = "inputs.source_sentence"  # the responses are similarities
    assert every - sent == {(path, source) for path in ("/similarity", "/embed", "/", "/invocations")}


def test_contents_that_fail_do_so_for_the_reason_in_their_name(library: Embedder) -> None:
    codes: dict[str, set[str]] = {}
    for name, content in CONTENTS.items():
        try:
            library.embed([content])
        except EmbedderError as error:
            codes.setdefault(error.code, set()).add(name)
    assert codes == {
        "invalid_request": {"empty text", "no content"},
        "input_too_long": {"text over the character limit", "image over the token limit", "truncate none"},
        "media_too_large": {"image over the pixel limit"},
        "unsupported_dimensions": {"dimensions too small", "dimensions too large"},
        "invalid_media": {
            *("truncated image", "a PDF", "empty image", "1x1 image", "1:500 image", "not base64", "a path"),
            *("list of frames with one that is broken", "no clip", "broken in a mixture"),
        },
    }
    ends = [library.embed([CONTENTS[f"truncate {how}"]])[0] for how in ("start", "end")]
    assert np.abs(ends[0] - ends[1]).max() > 1e-3


OUTPUT_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("/embed", {"items": ["red"]}),
    "local": ("/txt/embed", {"input": ["red"]}),
    "v1 string": ("/v1/embeddings", {"input": "red"}),
    "v1 messages": ("/v1/embeddings", {"messages": [{"role": "user", "content": "red"}]}),
}


@pytest.mark.parametrize("output_dtype", get_args(OutputDtype))
def test_output_type_is_the_same_on_every_route(
    output_dtype: OutputDtype, http: httpx.Client, library: Embedder
) -> None:
    (vector,) = library.embed(["red"], dimensions=100)
    expected = quantize(vector, output_dtype)
    got: dict[str, Any] = {}
    for way, (path, body) in OUTPUT_WAYS.items():
        fields = {**body, "dimensions": 100, "output_dtype": output_dtype}
        got[way] = outcome(path, http.post(path, json=fields))
        as_base64 = outcome(path, http.post(path, json={**fields, "encoding_format": "base64"}))
        data = as_base64[0] if isinstance(as_base64, list) else as_base64
        got[f"{way}, base64"] = np.frombuffer(base64.b64decode(data), expected.dtype)
    if output_dtype != "float16":  # Cohere has no such type
        kind = "float" if output_dtype == "float32" else output_dtype
        fields = {"texts": ["red"], "output_dimension": 100, "embedding_types": [kind]}
        got["v2 texts"] = http.post("/v2/embed", json=fields).json()["embeddings"][kind][0]
    step = int8_step(100) if output_dtype in ("int8", "uint8") else 0
    decided = np.abs(vector) > SAME  # the sign of the others may differ by rounding
    for way, values in got.items():
        assert len(values) == len(expected), way
        pair = [dequantize(np.array(one, expected.dtype), output_dtype, 100)[decided] for one in (values, expected)]
        assert np.abs(pair[0] - pair[1]).max() <= step + (2**-11 if output_dtype == "float16" else SAME), way
