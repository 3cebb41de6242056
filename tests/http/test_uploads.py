"""Images as files: a form or a body of bytes gives the vector of the same image in base64, within the same limits."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedder.errors import EmbedderError, InvalidMedia, InvalidRequest, RequestTooLarge
from embedder.http.dialects.local import IMAGES
from embedder.http.uploads import MAX_HEADER_BYTES, MAX_HEADERS, MAX_OPTIONS, upload_fields
from embedder.inputs.items import Image
from embedder.settings import Settings
from tests.conftest import Server, encoded, picture
from tests.http.asgi import Echo, call, chunks, longest_turn_s, status_and_error

PNG, JPEG = encoded(picture(70, 50)), encoded(picture(64, 48, 1), "JPEG")
BASE64 = base64.b64encode(PNG).decode()
SETTINGS = Settings(max_items_per_request=4)
UPLOAD = IMAGES.upload
assert UPLOAD is not None


def part(headers: str, data: bytes) -> bytes:
    return b"--edge\r\n" + headers.encode() + b"\r\n\r\n" + data + b"\r\n"


def named(name: str, data: bytes, more: str = "") -> bytes:
    return part(f'Content-Disposition: form-data; name="{name}"{more}', data)


def file_part(name: str, data: bytes) -> bytes:
    return named(name, data, '; filename="a.png"\r\nContent-Type: image/png')


def parse(
    *parts: bytes,
    query: str = "",
    content_type: str = "multipart/form-data; boundary=edge",
    end: bytes = b"--edge--\r\n",
) -> Any:
    values = upload_fields(content_type, b"".join(parts) + end, query, name="image", max_items=4)
    return UPLOAD.parse(asyncio.run(values), SETTINGS)  # type: ignore[union-attr]


def images(request: Any) -> list[Any]:
    return [item.parts[0].source for item in request.items]


@pytest.mark.parametrize("name", ["image", "images", "images[]", "file", "files", "input", "inputs"])
def test_file_of_any_of_the_names_is_an_image(name: str) -> None:
    request = parse(file_part(name, PNG))
    assert (images(request), request.is_list) == ([PNG], False)


def test_several_files_are_a_list_in_order() -> None:
    request = parse(file_part("image", PNG), file_part("image", JPEG))
    assert (images(request), request.is_list) == ([PNG, JPEG], True)


@pytest.mark.parametrize("more", ["; filename=a", '; filename=""', "; filename*=utf-8''%e2%82%ac.png", "\r\nContent-Type: image/png", "\r\ncontent-type: application/octet-stream"])  # fmt: skip
def test_part_with_a_file_name_or_a_type_of_files_is_bytes(more: str) -> None:
    assert images(parse(named("image", PNG, more))) == [PNG]


def test_text_of_a_form_may_be_base64() -> None:
    assert images(parse(named("image", BASE64.encode()))) == [BASE64]


def test_texts_of_a_form_and_the_query_are_options() -> None:
    texts = {"dimensions": "64", "normalize": "False", "encoding_format": "BASE64", "truncate": "None", "model": "any"}
    expected = IMAGES.parse({"input": BASE64, "dimensions": 64, "normalize": False, "encoding_format": "base64", "truncate": "none"}, SETTINGS)  # fmt: skip
    request = parse(*(named(name, text.encode()) for name, text in texts.items()), named("image", BASE64.encode()))
    assert request == expected
    query = "&".join(f"{name}={text}" for name, text in texts.items())
    assert parse(named("image", BASE64.encode()), query=query) == expected
    assert images(parse(query="dim=64", content_type="image/png", end=PNG)) == [PNG]


def test_form_takes_precedence_over_the_query_and_the_query_applies_to_json_too(client: httpx.Client) -> None:
    assert parse(file_part("image", PNG), named("dimensions", b"64"), query="dimensions=65").items[0].dimensions == 64
    for body, query, size in [({}, "dimensions=64", 64), ({"dimensions": 65}, "dim=64&dimensions=64&_=1", 65)]:
        answer = client.post(f"/img/embed?{query}", json={"input": BASE64, **body})
        assert answer.json()["dimensions"] == size
    assert (
        client.post("/img/embed?dimensions=x", json={"input": BASE64}).json()["error"]["code"]
        == "unsupported_dimensions"
    )


def test_field_left_empty_counts_as_not_given() -> None:
    request = parse(file_part("image", PNG), named("dimensions", b""), named("instruction", b""))
    assert (request.items[0].dimensions, request.items[0].instruction) == (None, None)


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([], InvalidRequest, "image: missing"),
        ([named("dimensions", b"64")], InvalidRequest, "image: missing"),
        ([named("image", b"")], InvalidRequest, "image: missing"),
        ([file_part("image", PNG), named("dimensions", b"many")], EmbedderError, "dimensions: got 'many' (a string)"),
        ([file_part("image", PNG), named("dimensions", b"64"), named("dimensions", b"65")], EmbedderError, "dimensions: got"),
        ([file_part("image", PNG), named("dimensions", b"9" * 5000)], EmbedderError, "dimensions: got '999"),
        ([file_part("image", PNG), named("normalize", b"maybe")], InvalidRequest, "normalize: got 'maybe'"),
        ([file_part("image", PNG), named("instrction", b"Find it")], InvalidRequest, "did you mean instruction"),
        ([file_part("imgae", PNG)], InvalidRequest, "imgae (did you mean image?)"),
        ([file_part("image", PNG), named("instruction", b"\xff\xfe")], InvalidRequest, "instruction: got bytes that are not UTF-8"),
        ([part("Content-Disposition: form-data", PNG)], InvalidRequest, "has no name"),
        ([part("X-Other: a", PNG)], InvalidRequest, "has no name"),
        ([named("image", b"AAAA", "; filename=a\r\nContent-Transfer-Encoding: base64")], InvalidRequest, "content-transfer-encoding: got b'base64'"),
        ([file_part("image", PNG)] * 5, RequestTooLarge, "got 5 items; allowed: 1 to 4"),
        ([named("a", b"")] * (4 + MAX_OPTIONS + 1), RequestTooLarge, f"more than {4 + MAX_OPTIONS} parts; allowed: 4 images ("),
        ([named("a", b"")] * 30_000, RequestTooLarge, f"more than {4 + MAX_OPTIONS} parts"),
        ([b"--edge\r\na: b\r\n\r\n", b"\r\n--edgeX" * 30_000], RequestTooLarge, f"more than {4 + MAX_OPTIONS} parts"),
        ([part("A: " + "b" * (MAX_HEADER_BYTES + 1), b"")], InvalidRequest, "Maximum header size"),
        ([part("A" * 100_000, b"")], InvalidRequest, "Maximum header size"),
        ([part("\r\n".join(["A: b"] * (MAX_HEADERS + 1)), b"")], InvalidRequest, "Maximum header count"),
        ([part("no colon", b"")], InvalidRequest, "not a valid form"),
        ([b"preamble\r\n", file_part("image", PNG)], InvalidRequest, "not a valid form"),
    ],
)  # fmt: skip
def test_hostile_or_mistaken_form_is_refused_with_the_reason(
    parts: list[bytes], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        parse(*parts)
    assert message in str(caught.value)


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary=""', "multipart/form-data; edge"])  # fmt: skip
def test_form_without_a_boundary_is_refused_by_that_name(content_type: str) -> None:
    with pytest.raises(InvalidRequest, match="with a boundary"):
        parse(file_part("image", PNG), content_type=content_type)


def test_boundary_of_a_thousand_bytes_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Boundary length"):
        parse(file_part("image", PNG), content_type="multipart/form-data; boundary=" + "b" * 1000)


def test_form_cut_off_anywhere_is_refused() -> None:
    whole = file_part("image", b"abc") + b"--edge"
    for length in range(len(whole) + 1):
        with pytest.raises(InvalidRequest, match="not a valid form"):
            parse(whole[:length], end=b"")


def test_bytes_of_a_form_are_freed_without_the_garbage_collector() -> None:
    form = b"".join((file_part("image", bytes(2**20)), b"--edge--\r\n"))
    gc.disable()
    tracemalloc.start()
    try:
        asyncio.run(upload_fields("multipart/form-data; boundary=edge", form, "", name="image", max_items=4))
        assert tracemalloc.get_traced_memory()[0] < 2**19
    finally:
        tracemalloc.stop()
        gc.enable()


def test_data_that_looks_like_the_boundary_stays_data() -> None:
    data = b"\r\n--edg\r\n--\r\n-edge\n--edge--\r\r\n--edgy"
    assert images(parse(file_part("image", data))) == [data]


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "IMAGE/PNG", "application/octet-stream", "image/x-anything; a=b"]
)
def test_body_of_bytes_is_one_image_whatever_its_subtype(content_type: str) -> None:
    request = parse(content_type=content_type, end=JPEG)
    assert (images(request), request.is_list) == ([JPEG], False)


@pytest.mark.parametrize(
    ("path", "types", "message"),
    [
        ("/img/embed", [b"text/plain"], "got text/plain; allowed: application/json, multipart/form-data, application/octet-stream, image/*"),
        ("/img/embed", [b"video/mp4"], "got video/mp4; allowed: application/json, multipart/form-data"),
        ("/img/embed", [b"application/x-www-form-urlencoded"], "allowed: application/json, multipart/form-data"),
        ("/img/embed", [b"image/png", b"image/png"], "got image/png and another one; allowed: one"),
        ("/img/embed", [b"application/json", b"image/png"], "got image/png and another one; allowed: one"),
        ("/img/embed", [b"image/png", b"application/json"], "got application/json and another one; allowed: one"),
        ("/embed", [b"image/png"], "got image/png; allowed: application/json; POST /img/embed takes files"),
        ("/embed", [b"multipart/form-data; boundary=x"], "allowed: application/json; POST /img/embed takes files"),
    ],
)  # fmt: skip
def test_other_content_types_are_refused_by_name(path: str, types: list[bytes], message: str) -> None:
    app = Echo()
    headers = [(b"content-type", one) for one in types]
    status, error = status_and_error(call(app, chunks(b""), path=path, headers=headers))
    assert (status, error["code"], app.calls) == (415, "unsupported_content_type", 0)
    assert message in error["message"]


def test_file_is_not_read_as_json() -> None:
    for body in (b"\0\0[[[,,", b"\xff\xfe\0a"):
        sent = call(Echo(), chunks(body), path="/img/embed", headers=[(b"content-type", b"image/png")])
        assert (sent[0]["status"], sent[1]["body"]) == (200, body)


def test_file_of_more_bytes_than_an_image_may_have_is_refused_as_in_base64(client: httpx.Client) -> None:
    data = bytes(Settings().max_image_bytes + 1)
    as_base64 = client.post("/img/embed", json={"input": base64.b64encode(data).decode()})
    for answer in (
        client.post("/img/embed", content=data, headers={"content-type": "image/png"}),
        client.post("/img/embed", files={"image": data}),
    ):
        assert (answer.status_code, answer.json()) == (413, as_base64.json())


def test_upload_has_the_vector_and_the_errors_of_base64(client: httpx.Client) -> None:
    assert isinstance(Image(PNG).source, bytes)
    for data in (PNG, JPEG, b"not a picture", b""):
        expected = client.post("/img/embed", json={"input": base64.b64encode(data).decode(), "dimensions": 64})
        for got in (
            client.post("/img/embed?dimensions=64", content=data, headers={"content-type": "image/png"}),
            client.post("/img/embed", files={"image": ("a.png", data)}, data={"dimensions": "64"}),
        ):
            assert got.status_code == expected.status_code
            assert got.json() == expected.json()
    both = client.post("/img/embed", files=[("image", PNG), ("image", b"no picture")])
    assert (both.status_code, both.json()["error"]["item"], both.json()["error"]["code"]) == (400, 1, InvalidMedia.code)


@pytest.mark.parametrize("host", ["[", "[::1", "a b", ""])
def test_file_is_taken_with_any_header_host(host: str, client: httpx.Client) -> None:
    for body in ({"content": PNG, "headers": {"content-type": "image/png"}}, {"files": {"image": PNG}}):
        headers = {**body.pop("headers", {}), "host": host}
        assert client.post("/img/embed?dimensions=64", headers=headers, **body).json()["dimensions"] == 64


@pytest.mark.parametrize("name", ["dimensions", "normalize", "instruction", "truncate", "encoding_format", "nothing"])
def test_file_in_the_place_of_an_option_is_an_error_of_the_request(name: str) -> None:
    for data in (b"\xff\xfe\0", b"\x89PNG" * 1000):
        with pytest.raises(InvalidRequest, match=name):
            parse(file_part("image", PNG), file_part(name, data))


def test_curl_sends_files_in_both_ways(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(JPEG)
    ways = (["-F", "image=@cat.jpg"], ["--data-binary", "@cat.jpg", "-H", "content-type: image/jpeg"])
    expected = httpx.post(f"{server.url}/img/embed", json={"input": base64.b64encode(JPEG).decode()}).json()
    for way in ways:
        done = subprocess.run(
            ["curl", "-sS", f"{server.url}/img/embed", *way], cwd=tmp_path, capture_output=True, check=True
        )
        assert json.loads(done.stdout) == expected


def test_form_of_many_parts_does_not_stop_the_event_loop() -> None:
    """60 kB of small parts take 7 ms to parse."""
    body = file_part("image", b"") * 600 + b"--edge--\r\n"
    assert len(body) > 2**15
    fields = upload_fields("multipart/form-data; boundary=edge", body, "", name="image", max_items=1000)
    assert asyncio.run(longest_turn_s(fields)) < 0.004
