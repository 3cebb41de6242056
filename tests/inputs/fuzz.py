"""Coverage-guided fuzzing of everything that reads untrusted bytes: `python -m tests.inputs.fuzz media`.

Atheris (the `fuzz` extra) mutates valid inputs to reach new lines of this project and of Pillow. It stops at the first
input that gives neither a result nor an `InvalidRequest`, and writes it to the current folder. `test_fuzz` checks the
same functions with hypothesis.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import numpy as np

from embedder.errors import InvalidMedia, InvalidRequest, MediaTooLarge
from embedder.http.dialects.cohere import parse_cohere
from embedder.http.dialects.embed import parse_embed
from embedder.http.dialects.local import parse_image_request, parse_text_request
from embedder.http.dialects.openai import parse_embeddings
from embedder.http.request_body import read_json
from embedder.inputs.image import load_image
from embedder.inputs.items import EmbeddingItem, Video
from embedder.inputs.regimes import CheckpointRegime
from embedder.inputs.video import load_video
from embedder.settings import Settings
from tests.conftest import encoded, picture
from tests.inputs import heic, hostile

SETTINGS = Settings(max_image_pixels=1_000_000, max_items_per_request=20, decode_timeout_s=5)
REGIME = CheckpointRegime(max_pixels=65_536, clip_max_pixels=1_000_000)
PARSERS = (parse_text_request, parse_image_request, parse_embed, parse_embeddings, parse_cohere)


def check_image(data: bytes) -> None:
    """An image whose sides are multiples of the token size, or one of the two errors."""
    try:
        values = load_image(data, REGIME, SETTINGS)
    except (InvalidMedia, MediaTooLarge):
        return
    assert values.dtype == np.uint8
    assert values.shape[0] % 32 == values.shape[1] % 32 == 0 < values.size


def check_video(data: bytes) -> None:
    """An even number of frames and a time for each, or one of the two errors."""
    try:
        clip = load_video(Video(data), REGIME, SETTINGS)
    except (InvalidMedia, MediaTooLarge):
        return
    assert len(clip.frames) == len(clip.seconds)
    assert len(clip.frames) % 2 == 0 < clip.frames.size


def check_request(data: bytes) -> None:
    """Items or an `InvalidRequest`, on every route."""
    for parse in PARSERS:
        try:
            items = parse(read_json(data), SETTINGS).items
        except InvalidRequest:
            continue
        assert all(isinstance(item, EmbeddingItem | InvalidRequest) for item in items)
        assert 1 <= len(items) <= SETTINGS.max_items_per_request


IMAGES = {
    kind: encoded(picture(40, 36), kind)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF", "TIFF", "ICO", "HEIF")
}
CHECKS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "media": (check_image, [*IMAGES.values(), *heic.hostile_files().values()]),
    "video": (check_video, list(hostile.videos().values())),
    "request": (check_request, [json.dumps(body).encode() for body in hostile.GOOD_BODIES.values()]),
}


def main() -> None:
    """Run the command."""
    import atheris  # installed with the extra only

    parser = argparse.ArgumentParser(description="Fuzz the code that reads untrusted bytes.")
    parser.add_argument("what", choices=CHECKS)
    parser.add_argument("--seconds", type=int, default=600)
    chosen = parser.parse_args()
    check, seeds = CHECKS[chosen.what]
    for function in gc.get_objects():  # of the modules imported so far, which excludes torch
        if isinstance(function, FunctionType) and str(function.__module__).startswith(("PIL.", "embedder.")):
            atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        options = [f"-max_total_time={chosen.seconds}", "-timeout=30", "-rss_limit_mb=4096", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *options, corpus], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
