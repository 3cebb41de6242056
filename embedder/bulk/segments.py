"""Long clips -> segments, a row each: `clip.mp4#t=10,20`, as a media fragment names a part of a video."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Self

from embedder.errors import EmbedderError
from embedder.inputs.decoder import repeated_if_killed
from embedder.inputs.decoder_process import RETRY_BYTES, DecoderProcess, ProcessDecoder
from embedder.inputs.limits import decode_deadline
from embedder.settings import Settings

Segment = tuple[float, float]  # start and end in seconds

_FRAGMENT = re.compile(r"(.+)#t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", re.DOTALL)


def segment_names(name: str, duration_s: float, segment_s: float) -> list[str]:
    """The rows of a clip. The last segment is the rest; a rest below half a segment belongs to the one before it."""
    count = max(1, int(duration_s / segment_s + 0.5))
    ends = [(number + 1) * segment_s for number in range(count - 1)] + [max(duration_s, 0.001)]
    starts = [0.0, *ends[:-1]]
    return [f"{name}#t={format_seconds(start)},{format_seconds(end)}" for start, end in zip(starts, ends, strict=True)]


def split_segment(name: str) -> tuple[str, Segment | None]:
    """`clip.mp4#t=10,20` -> path and segment; None of any other row."""
    found = _FRAGMENT.fullmatch(name)
    return (found[1], (float(found[2]), float(found[3]))) if found else (name, None)


class ClipMeter:
    """Measures clips in one process, which opens them. Use it in a `with` block and in one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process = DecoderProcess(settings, lambda _: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()

    def duration_s(self, data: bytes) -> float:
        """Seconds of a clip; 0 if it cannot be opened, for which embedding it has the reason."""
        try:
            return repeated_if_killed(lambda: self._measure(data))
        except EmbedderError:
            return 0.0

    def _measure(self, data: bytes) -> float:
        decoder = ProcessDecoder(self._process, RETRY_BYTES, lambda _: False)
        with decoder.open_clip(data, self._settings, decode_deadline(self._settings)) as clip:
            return float(clip.num_frames / clip.fps)


def format_seconds(seconds: float) -> str:
    """With as many decimals as needed, at most three."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")
