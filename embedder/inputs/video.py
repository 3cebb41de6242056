"""A clip -> sampled RGB frames, resized, within limits, and the time of each. The other door for untrusted bytes.

Clips come as lists of pictures, or encoded (MP4/MOV, WebM/Matroska, GIF) and then decoded by FFmpeg's libraries from
memory: the container is told from its first bytes, never guessed by FFmpeg, whose other formats name files and
addresses; its codecs are those of a short list. Only what leads to a sampled frame is decoded, one frame at a time.
"""

from __future__ import annotations

import io
import itertools
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.image import (
    ImageGeometry,
    check_time,
    decode_deadline,
    decode_image,
    decoded_bytes,
    decoding,
    describe,
    encoded_bytes,
    open_image,
    resize,
    resized_size,
)
from embedder.inputs.items import Video
from embedder.settings import Settings

FRAME_MAX_PIXELS = 768 * 32 * 32  # of one video frame; the reference's FRAME_MAX_PIXELS
VIDEO_MAX_PIXELS = 10 * FRAME_MAX_PIXELS  # of all frames together; the reference's MAX_TOTAL_PIXELS
LIST_FPS = 2.0  # of a list of frames that says nothing; qwen-vl-utils 0.0.14, `fetch_video`
SAMPLE_FPS = 1.0  # looked at of an encoded clip; the reference's FPS
MIN_SAMPLED_FRAMES = 4  # as far as the clip has them; qwen-vl-utils' FPS_MIN_FRAMES
PROBED_PIXELS = 4  # times the limit
MAX_CODED_FRAMES = 100_000  # 55 minutes at 30 a second
# FFmpeg keeps some 70 bytes for each entry, however few bytes of an MP4 declare them: a file of 5 KB with 60 million
# took 4.5 GB and 13 s (FFmpeg 8.0, 2026-11). A frame or sound sample counts up to three times.
MAX_INDEX_ENTRIES = 2_000_000
DECODER_BYTES_PER_PIXEL = 46  # of a frame: H.264 with 16 references of 7040x7040 took 2.3 GB
MAX_BOXES = 100_000  # outermost ones; a fragment is two
MAX_TABLES = 64  # of one kind; a stream has one

CONTAINERS = "MP4, MOV, WebM, Matroska or GIF"
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "prores", "gif")

_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_SEGMENT = b"\x18\x53\x80\x67"  # Matroska's outermost element


@dataclass(frozen=True)
class Clip:
    """`frames`: (num_frames, height, width, 3) uint8, an even number. `seconds`: when each is shown."""

    frames: NDArray[np.uint8]
    seconds: tuple[float, ...]


def load_video(video: Video, geometry: ImageGeometry, settings: Settings, deadline: float | None = None) -> Clip:
    """A clip -> frames of one size. The last one is repeated where their number is odd.

    The frames' area is bounded one by one and together, as the reference bounds lists of frames (it bounds encoded
    clips one by one only: a minute would take 24,576 tokens, three times its own context), and from below by the
    model's own minimum: qwen-vl-utils would enlarge small frames. The sides go to multiples of the model's factor in
    one step; qwen-vl-utils rounds pictures of a list to multiples of 64 before (it passes a factor where it asks for
    a patch size). A rotation that the container asks for is not applied, like EXIF's.

    Without a deadline the time counts from here. Raises `InvalidMedia` and `MediaTooLarge`.
    """
    deadline = decode_deadline(settings) if deadline is None else deadline
    if isinstance(video.source, tuple):
        return _load_frames(video.source, video.fps or LIST_FPS, geometry, settings, deadline)
    return _load_encoded(video.source, video.fps or SAMPLE_FPS, geometry, settings, deadline)


def sample_indices(num_frames: int, fps: float, sample_fps: float, max_frames: int) -> list[int]:
    """Which of a clip's frames are looked at: `sample_fps` a second, an even number spread from first to last.

    As qwen-vl-utils' `smart_nframes` and readers; a single frame, which they refuse, is taken.
    """
    wanted = max(num_frames / fps * sample_fps, MIN_SAMPLED_FRAMES)
    count = max(1, int(min(wanted, max_frames // 2 * 2, num_frames)) // 2 * 2)
    # float32, as torch's linspace: a half would round to the other side otherwise
    return [int(index) for index in np.linspace(0, num_frames - 1, count, dtype=np.float32).round()]


def _load_frames(
    sources: Sequence[object], fps: float, geometry: ImageGeometry, settings: Settings, deadline: float
) -> Clip:
    if not 1 <= len(sources) <= settings.max_video_frames:
        raise InvalidMedia(f"video of {len(sources)} frames; allowed: 1 to {settings.max_video_frames}")
    images = [open_image(source, settings, deadline) for source in sources]
    images += images[-1:] * (len(images) % 2)
    sizes = [_frame_size(image.height, image.width, len(images), geometry) for image in images]
    if len(set(sizes)) > 1:  # the reference cannot stack them
        shown = ", ".join(dict.fromkeys(f"{image.width}x{image.height}" for image in images))
        raise InvalidMedia(f"video of frames of {shown[:60]} pixels; allowed: frames of one size")
    frames = np.empty((len(images), *sizes[0], 3), np.uint8)
    for row in frames:
        image = images.pop(0)
        with decoding(decoded_bytes(image)):
            row[:] = resize(decode_image(image), *sizes[0])
        del image  # with its pixels
    # a repeated last frame counts on, as in qwen-vl-utils
    return Clip(frames, tuple(index / fps for index in range(len(frames))))


def _frame_size(height: int, width: int, num_frames: int, geometry: ImageGeometry) -> tuple[int, int]:
    max_pixels = min(FRAME_MAX_PIXELS, VIDEO_MAX_PIXELS // num_frames * 2)
    max_pixels = max(min(max_pixels, geometry.max_pixels), geometry.min_pixels)  # thousands of frames
    return resized_size(height, width, ImageGeometry(geometry.factor, geometry.min_pixels, max_pixels))


def _load_encoded(
    source: bytes | str, sample_fps: float, geometry: ImageGeometry, settings: Settings, deadline: float
) -> Clip:
    data = encoded_bytes(source, "video", settings.max_video_bytes)
    # While FFmpeg looks for what a header omits its decoders hide a size above their limit, so that is larger here.
    probing = {"max_pixels": str(PROBED_PIXELS * settings.max_image_pixels)}
    try:
        with av.open(
            io.BytesIO(data),
            "r",
            format=_container_format(data),
            options=probing,
            metadata_errors="ignore",
            timeout=settings.decode_timeout_s,  # of FFmpeg's own loops over packets; one packet's decoding is bounded
        ) as container:  # by its frame's pixels
            stream = _video_stream(container, settings)
            packets = _read_packets(container, stream, deadline, settings)
            times, fps = _timeline(packets, stream)
            indices = sample_indices(len(times), fps, sample_fps, settings.max_video_frames)
            indices += indices[-1:] * (len(indices) % 2)
            height, width = _frame_size(stream.height, stream.width, len(indices), geometry)
            stream.codec_context.options = {"max_pixels": str(settings.max_image_pixels)}
            stream.codec_context.thread_count = 1  # the clips of other items run in other threads
            frames = np.empty((len(indices), height, width, 3), np.uint8)
            decoded = _decode(stream.codec_context, packets, [times[index] for index in indices], deadline, settings)
            with decoding(DECODER_BYTES_PER_PIXEL * stream.width * stream.height):
                for row, frame in zip(frames, decoded, strict=True):
                    row[:] = resize(frame.to_image(), height, width)  # type: ignore[no-untyped-call]  # av's
    except av.FFmpegError as error:
        check_time(deadline, settings)  # it may have been cut off for that
        raise InvalidMedia(f"video cannot be decoded, it is damaged or cut off: {error.strerror}") from error
    return Clip(frames, tuple(index / fps for index in indices))


def _container_format(data: bytes) -> str:
    """FFmpeg's name of the container. Raises `InvalidMedia` for anything else, and where its end is missing."""
    if data[4:8] in _MP4_STARTS and not (data[4:8] == b"ftyp" and data[8:12] in _PICTURE_BRANDS):
        _check_mp4(data)
        return "mov"
    if data.startswith(b"\x1aE\xdf\xa3"):
        _check_matroska(data)
        return "matroska"
    if data.startswith((b"GIF87a", b"GIF89a")):
        if not data.rstrip(b"\0\r\n").endswith(b";"):
            raise InvalidMedia("video is cut off: a GIF of which the end is missing")
        return "gif"
    raise InvalidMedia(f"video: {describe(data)}; allowed: {CONTAINERS}")


def _check_mp4(data: bytes) -> None:
    """An MP4's boxes are whole, and its index does not grow out of proportion when FFmpeg expands it."""
    position = num_boxes = num_entries = 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size == 1 and position + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, position + 8)
        end = position + size if size else len(data)
        if end > len(data):
            raise InvalidMedia(
                f"video is cut off: its {kind.decode('latin-1')} box ends at byte {end} of {len(data)} that were sent"
            )
        if end < position + 8:
            raise InvalidMedia(f"video is damaged: a box of {size} bytes at byte {position}")
        if kind != b"mdat":
            num_entries += _count_index_entries(data, position, end)
        position = end
        num_boxes += 1
        if num_entries > MAX_INDEX_ENTRIES or num_boxes > MAX_BOXES:
            raise MediaTooLarge(
                f"video with an index of {num_entries} entries or more, in {num_boxes} boxes; "
                f"allowed: up to {MAX_INDEX_ENTRIES}, in {MAX_BOXES}"
            )


def _count_index_entries(data: bytes, start: int, end: int) -> int:
    """Entries that the sample tables of a box declare, which need not take bytes of their own."""
    if data.find(b"cmov", start, end) >= 0:
        raise InvalidMedia("video with a compressed header; allowed: an MP4 or MOV without")
    total = 0
    for kind, offset, most in ((b"stsz", 12, MAX_TABLES), (b"stz2", 12, MAX_TABLES), (b"trun", 8, MAX_BOXES)):
        for place in _find_all(data, kind, start, end, most):  # a constant size is said once
            total += int.from_bytes(data[place + offset : place + offset + 4])
    for kind in (b"stts", b"ctts"):  # runs: how many samples, and their duration or offset
        for place in _find_all(data, kind, start, end, MAX_TABLES):
            num_runs = min(int.from_bytes(data[place + 8 : place + 12]), max(0, end - place - 12) // 8)
            runs = np.frombuffer(data, ">u4", 2 * num_runs, place + 12) if num_runs else np.empty(0, np.uint32)
            total += int(runs[::2].sum(dtype=np.int64))
    return total


def _find_all(data: bytes, kind: bytes, start: int, end: int, most: int) -> Iterator[int]:
    for _ in range(most):
        start = data.find(kind, start, end)
        if start < 0:
            return
        yield start
        start += len(kind)
    raise MediaTooLarge(f"video with {most} or more {kind.decode()} tables; allowed: fewer")


def _check_matroska(data: bytes) -> None:
    """The segment is as long as it says it is. One that says nothing (a live recording) ends where it ends."""
    start = data.find(_SEGMENT, 0, 4096) + len(_SEGMENT)
    if start < len(_SEGMENT) or start >= len(data):
        raise InvalidMedia("video is damaged: a Matroska header without a segment")
    num_bytes = 9 - data[start].bit_length()  # the leading zeros tell the length of the size that follows
    size = int.from_bytes(data[start : start + num_bytes]) & ~(1 << 7 * num_bytes)
    end = start + num_bytes + size
    if size != (1 << 7 * num_bytes) - 1 and end > len(data):
        raise InvalidMedia(f"video is cut off: its segment ends at byte {end} of {len(data)} that were sent")


def _video_stream(container: InputContainer, settings: Settings) -> VideoStream:
    """The first stream of moving pictures, of a codec and size that may be decoded."""
    streams = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise InvalidMedia(f"video has no pictures, it holds {kinds}; allowed: at least one frame")
    stream = streams[0]
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
    if codec not in CODECS:
        raise InvalidMedia(f"video of codec {codec}; allowed: {', '.join(CODECS)}")
    width, height = stream.width, stream.height
    if width * height > settings.max_image_pixels:
        raise MediaTooLarge(
            f"video of {width}x{height} = {width * height} pixels; allowed: up to {settings.max_image_pixels}"
        )
    if not width or not height:
        raise MediaTooLarge(
            f"video whose frames have no size that can be read, or more than {PROBED_PIXELS} times the "
            f"{settings.max_image_pixels} pixels that are allowed"
        )
    return stream


def _read_packets(
    container: InputContainer, stream: VideoStream, deadline: float, settings: Settings
) -> list[Packet[Any]]:
    """Every coded frame, in the order of decoding. An index may name the same bytes often, so they are counted."""
    packets: list[Packet[Any]] = []
    num_bytes = 0
    for packet in container.demux():
        check_time(deadline, settings)
        num_bytes += packet.size
        if isinstance(packet.stream, VideoStream) and packet.stream.index == stream.index and packet.size:
            packets.append(packet)
        if len(packets) > MAX_CODED_FRAMES:
            raise MediaTooLarge(f"video of more than {MAX_CODED_FRAMES} frames; allowed: up to {MAX_CODED_FRAMES}")
        if num_bytes > settings.max_video_bytes:
            raise MediaTooLarge(f"video of over {num_bytes} bytes unpacked; allowed: up to {settings.max_video_bytes}")
    for index, packet in enumerate(packets):
        if packet.is_corrupt or packet.pts is None:
            raise InvalidMedia(f"video is damaged or cut off at its frame {index}")
    if len(packets) < stream.frames:
        raise InvalidMedia(f"video is cut off: {len(packets)} of its {stream.frames} frames were sent")
    return packets


def _timeline(packets: list[Packet[Any]], stream: VideoStream) -> tuple[list[int], float]:
    """Time stamps of the frames that are shown, in order, and how many there are a second.

    The rate is the header's where the time stamps bear it out within 2 %, as the reference's readers take it.
    """
    shown = sorted((packet.pts or 0, packet.duration or 0) for packet in packets if _is_shown(packet, stream))
    if not shown:
        raise InvalidMedia("video of 0 frames; allowed: at least 1")
    times = [pts for pts, _ in shown]
    span = times[-1] - times[0]
    ticks = span + (shown[-1][1] or span / max(1, len(times) - 1))
    header = float(stream.average_rate or 0)
    measured = len(times) / (ticks * float(stream.time_base or 0)) if ticks and stream.time_base else header
    if not measured:
        raise InvalidMedia("video whose frames have no time")
    return times, header if abs(header - measured) <= 0.02 * measured else measured


def _is_shown(packet: Packet[Any], stream: VideoStream) -> bool:
    """Not cut away by an edit list, nor a VP8 frame that others are only predicted from."""
    is_hidden = stream.codec_context.codec.canonical_name == "vp8" and not bytes(packet)[0] & 0x10
    return not packet.is_discard and not is_hidden


def _decode(
    context: VideoCodecContext,
    packets: list[Packet[Any]],
    times: list[int],
    deadline: float,
    settings: Settings,
) -> Iterator[VideoFrame]:
    """The frames shown at `times` (ascending). Groups of pictures between them are skipped, not decoded."""
    context.open(strict=False)
    can_skip = context.codec.canonical_name in ("h264", "hevc")  # one packet at a time
    for start, wanted in _runs(packets, times):
        for packet in itertools.chain(packets[start:], [None]):
            check_time(deadline, settings)
            if can_skip and packet is not None:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in context.decode(packet):
                while wanted and frame.pts is not None and frame.pts >= wanted[0]:
                    if frame.is_corrupt:
                        raise InvalidMedia("video is damaged: a sampled frame has errors")
                    wanted.pop(0)
                    yield frame
            if not wanted:
                break
        else:
            raise InvalidMedia(f"video is damaged: {len(wanted)} of {len(times)} sampled frames cannot be decoded")
        context.flush_buffers()


def _runs(packets: list[Packet[Any]], times: list[int]) -> list[tuple[int, list[int]]]:
    """Where to start decoding, and the frames to get from there on.

    A frame is decoded from the key frame before it; from the one before that if it is shown before its own (a
    leading picture of an open group).
    """
    place = {packet.pts: index for index, packet in enumerate(packets)}
    keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    runs: list[tuple[int, list[int]]] = []
    last = -1
    for pts in times:
        number = bisect_right(keys, place[pts]) - 1
        while number > 0 and (packets[keys[number]].pts or 0) > pts:
            number -= 1
        start = keys[number] if number >= 0 else 0
        if not runs or start > last:
            runs.append((start, []))
        runs[-1][1].append(pts)
        last = max(last, place[pts])
    return runs
