"""The tokens of items and texts, for callers that count before they send. Of media only the headers are read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from embedder.errors import RequestTooLarge
from embedder.inputs import video
from embedder.inputs.decoder import Decoder, repeated_if_killed
from embedder.inputs.decoder_process import can_start_processes, decoder_for_one_item
from embedder.inputs.items import EmbeddingItem, Image, Video
from embedder.inputs.limits import decode_deadline
from embedder.inputs.preprocess import Preprocessor
from embedder.settings import Settings


def item_ids(item: EmbeddingItem, preprocessor: Preprocessor) -> list[int]:
    """The ids of an item's whole sequence, before it is cut. Raises `InvalidMedia` and `MediaTooLarge`."""
    return preprocessor.prompt_ids(item, *repeated_if_killed(lambda: _measure(item, preprocessor)))


def _measure(
    item: EmbeddingItem, preprocessor: Preprocessor
) -> tuple[list[tuple[int, int, int]], list[Sequence[float]]]:
    """The grid of each image and video, and the times of each video's frames, in seconds."""
    settings, vision = preprocessor.settings, preprocessor.vision
    deadline = decode_deadline(settings)
    grids: list[tuple[int, int, int]] = []
    seconds: list[Sequence[float]] = []
    with _decoder(settings) as decoder:
        for part in item.parts:
            match part:
                case Image():
                    header = decoder.open_image(part.source, settings, deadline)
                    # a picture that is stored turned has as many tokens
                    size = vision.regime.resize_image(header.height, header.width)
                    grids.append((1, size.height // vision.factor, size.width // vision.factor))
                case Video():
                    (height, width), sampling = video.measure_video(part, vision.regime, settings, deadline, decoder)
                    num_steps = len(sampling.indices) // vision.temporal_patch_size
                    grids.append((num_steps, height // vision.factor, width // vision.factor))
                    seconds.append(sampling.seconds)
    return grids, seconds


def _decoder(settings: Settings) -> AbstractContextManager[Decoder]:
    return decoder_for_one_item(settings) if can_start_processes() else nullcontext(Decoder())


MAX_SHOWN_TOKENS = 2**16  # of a request: each is up to 500 bytes here, and built with the GIL


def check_num_shown(num_tokens: int) -> None:
    """Raise `RequestTooLarge` for more tokens than a response may show."""
    if num_tokens > MAX_SHOWN_TOKENS:
        raise RequestTooLarge(
            f"{num_tokens} or more tokens; allowed: up to {MAX_SHOWN_TOKENS} in one request. Send fewer texts, or "
            "`items`, which are only counted"
        )


def text_tokens(text: str, preprocessor: Preprocessor, num_shown: int = 0) -> list[dict[str, Any]]:
    """The tokens of a text by itself, without the prompt: id, text, and place in characters.

    `num_shown`: tokens of the response's other texts. Raises `RequestTooLarge`.
    """
    encoding = preprocessor.tokenizer.encode_batch([text], add_special_tokens=False)[0]
    check_num_shown(num_shown + len(encoding))
    return [
        {"id": token, "text": text[start:stop], "special": False, "start": start, "stop": stop}
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
    ]


def token_strings(ids: Sequence[int], preprocessor: Preprocessor) -> list[str]:
    """The tokens as the vocabulary writes them; empty for an unknown id."""
    return [preprocessor.tokenizer.id_to_token(token) or "" for token in ids]


def text_of(ids: Sequence[int], preprocessor: Preprocessor, *, skip_special_tokens: bool) -> str:
    """Ids -> text. Unknown ids have none."""
    return str(preprocessor.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
