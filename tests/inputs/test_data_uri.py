"""Media strings as clients write them are decoded, or refused with the reason; none is taken for a URL or a text."""

from __future__ import annotations

import base64
import contextlib
import random
import time
from typing import Any

import numpy as np
import pytest

from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.address import is_url
from embedder.inputs.data_uri import decode_base64, media_kind, video_frames
from embedder.inputs.image import load_image
from embedder.inputs.items import Image, Video, item_from_fields
from embedder.inputs.jpeg import count_scans
from embedder.inputs.picture import encoded_bytes
from embedder.inputs.regimes import CheckpointRegime
from embedder.settings import Settings
from tests.conftest import encoded, picture

REGIME = CheckpointRegime()
DATA = encoded(picture(70, 50))
BASE64 = base64.b64encode(DATA).decode()
JPEG = encoded(picture(64, 48), "JPEG")


def load(source: Any) -> Any:
    return load_image(source, REGIME, Settings())


@pytest.mark.parametrize(
    "source",
    [
        f"DATA:image/png;base64,{BASE64}",
        f" \r\n\tdata:image/png;base64,{BASE64}\n",
        f"data:Image/PNG;BASE64,{BASE64}",
        f"data:image/png; base64, {BASE64}",
        f"data:image/png;name=a.png;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"data:application/octet-stream;base64,{BASE64}",
        f"data:image/jpeg;base64,{BASE64}",  # the bytes decide, not the type
        BASE64.rstrip("="),
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        f"data:image/png;base64,{BASE64.replace('+', '-').replace('/', '_')}",
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('=', '%3D')}",
        f"\n{BASE64[:76]}\n{BASE64[76:]}\n",
        f"  {BASE64[:40]} {BASE64[40:]}",
    ],
    ids=range(14),
)
def test_data_uri_and_base64_in_any_usual_form_are_the_same_picture(source: str) -> None:
    assert np.array_equal(load(source), load(DATA))
    assert not is_url(source)


def test_megabytes_of_url_safe_base64_in_lines_are_decoded_whole() -> None:
    data = random.Random(0).randbytes(3 * 2**20)
    text = base64.urlsafe_b64encode(data).decode()
    lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    assert decode_base64(lines.rstrip("=")) == data


@pytest.mark.parametrize("shift", range(4))
def test_escape_or_padding_anywhere_in_megabytes_of_base64_is_decoded(shift: int) -> None:
    data = b"\xfb\xef\xbe" * 200_000 + b"ab"[: 2 - shift % 3]
    text = " " * shift + base64.b64encode(data).decode()
    assert decode_base64(text.replace("+", "%2B").replace("/", "%2f").replace("=", "%3d")) == data
    padded = " " * (2**18 - len(text) % 2**18 + shift) + text  # so that the padding is in two slices
    assert decode_base64(padded) == data


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png,abc", "image is a data URI without base64: 'data:image/png'; allowed: data:..;base64,"),
        ("DATA:image/png;base64", "image is a data URI without base64"),
        ("data:;base64,a", "image is not valid base64"),
        ("data:image/png;base64,it's red", "image is not valid base64"),
        ("data:text/plain;base64,aGVsbG8=", "image: not a JPEG"),
        ("data:;base64,", "image is empty"),
    ],
)
def test_data_uri_that_is_no_picture_is_refused_with_the_reason(source: str, message: str) -> None:
    with pytest.raises(InvalidMedia) as caught:
        load(source)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("url", ["https://a.com/b.png", " HTTPS://a.com", "file:///etc/passwd", "s3://bucket/key"])
def test_url_of_any_scheme_and_case_is_a_url(url: str) -> None:
    assert is_url(url)
    assert media_kind(url) is None


def test_frames_in_one_data_uri_are_a_list_of_frames() -> None:
    uri = f"data:video/jpeg;base64,{BASE64},{BASE64}"
    assert video_frames(uri) == (BASE64, BASE64)
    assert item_from_fields({"video": uri}).parts == (Video((BASE64, BASE64)),)
    assert item_from_fields({"video": uri.upper()[:23] + BASE64, "fps": 1}).parts == (Video((BASE64,), 1),)
    assert item_from_fields({"video": [uri, uri]}).parts == (Video((BASE64, BASE64)),) * 2
    assert video_frames("data:video/mp4;base64,AAAA") == ()
    assert video_frames("data:video/jpeg,AAAA") == ()
    part = {"type": "video", "video": uri}
    assert item_from_fields({"content": [part]}).parts == (Video((BASE64, BASE64)),)
    assert item_from_fields({"image": uri}).parts == (Image(uri),)


def test_scans_are_counted_in_the_first_picture_only() -> None:
    own = count_scans(JPEG, 1000)
    assert own >= 1
    assert count_scans(JPEG + b"\xff\xda" * 500, 1000) == own  # a motion photo's video
    comment = b"\xff\xfe" + (1002).to_bytes(2) + b"\xff\xda" * 500
    assert count_scans(JPEG[:2] + comment + JPEG[2:], 1000) == own  # a thumbnail, say
    assert np.array_equal(load(JPEG + b"\xff\xda" * 500), load(JPEG))
    assert count_scans(DATA, 1000) == 0
    assert count_scans(b"\xff\xd8" + b"\xff\xda\0\2" * 500, 101) == 101  # not counted further
    for num_bytes in range(2**18 - 4, 2**18 + 4):  # searched in pieces
        assert count_scans(b"\xff\xd8" + bytes(num_bytes) + b"\xff\xda\0\2", 5) == 1
    assert count_scans(b"\xff\xd8\xff", 5) == count_scans(b"\xff\xd8\xff\xda", 5) - 1 == 0


@pytest.mark.parametrize(
    ("field", "source"),
    [
        ("image", "data:" + " " * 1000 + "x"),
        ("image", "data:" + "\n" * 500 + ";" * 500),
        ("image", f"data:image/png;base64,{'%41' * 2_000_000}"),
        ("image", f"data:image/png;base64,{'%2b' * 2_000_000}"),
        ("image", "é" * 4_000_000),
        ("video", f"data:video/jpeg;base64,{'%41' * 2_000_000}"),
        ("video", f"data:video/jpeg;base64,{',' * 2_000_000}"),
        ("video", f"data:video/jpeg;base64,{'%2C' * 2_000_000}"),
        ("video", f"data:video/jpeg{';ab' * 8_000_000}"),
        ("video", " " * 20_000_000),
        ("video", "%" * 20_000_000),
    ],
    ids=range(11),
)
def test_any_string_of_megabytes_is_read_in_a_bounded_time(field: str, source: str) -> None:
    """Of CPU: 0.6 to 2 s before, for the shorter ones in a list of 2048. A data URI is split in the event loop."""
    start = time.thread_time()
    for _ in range(100 if len(source) < 2000 else 1):
        with contextlib.suppress(InvalidMedia, MediaTooLarge):
            media_kind(source)
            is_url(source)
            item_from_fields({field: source})
            encoded_bytes(source, "image", 2**26)
    assert time.thread_time() - start < 0.5
