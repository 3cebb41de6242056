"""An encoded video -> its frames as RGB values, decoded by FFmpeg's libraries from memory.

Checks between the calls of FFmpeg are not enough, because one call can run for hours or take gigabytes. So the bytes of
callers are decoded in a process that can be killed, see `decoder_process`.

The container format is recognized by its first bytes, because some of FFmpeg's demuxers open files and URLs that are
named inside a file. Only the codecs of a short list are decoded, and only frames that a wanted frame depends on.
"""

from __future__ import annotations

import io
import itertools
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.formats import VIDEO_CODECS, find_format, unsupported_format
from embedder.inputs.limits import MediaLimits, TooLittleMemory, check_deadline, check_num_pixels
from embedder.inputs.orientation import UPRIGHT, matrix_orientation, turn_values

MAX_CODED_FRAMES = 100_000  # 55 minutes at 30 frames per second
MAX_BOXES = 100_000  # outermost boxes of an MP4; a fragment is two
MAX_TABLES = 64  # sample tables of one kind; a stream has one
# FFmpeg allocates about 70 bytes for each index entry that an MP4 declares: a file of 5 KB that declared 60 million
# took 4.5 GB and 13 s (FFmpeg 8.0, 2026-11). A frame or audio sample counts up to three times.
MAX_INDEX_ENTRIES = 2_000_000
PROBE_PIXELS_FACTOR = 4  # see `open_clip`
DECODER_BYTES_PER_PIXEL = 46  # H.264 with 16 reference frames of 7040x7040 took 2.3 GB

_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"  # ID of the outermost element after the header


class OpenClip:
    """A video whose packets are read, and whose frames can be decoded.

    `width` and `height`: of the frames according to the header. `fps`: frames per second. `num_bytes`: approximate
    peak memory of decoding.
    """

    def __init__(self, container: InputContainer, limits: MediaLimits, deadline: float) -> None:
        self._limits = limits
        self._deadline = deadline
        self._stream = _video_stream(container, limits)
        self._packets = _read_packets(container, self._stream, deadline, limits)
        self._times, self.fps = _timeline(self._packets, self._stream)
        self.width, self.height = self._stream.width, self._stream.height
        self.num_frames = len(self._times)
        self.num_bytes = DECODER_BYTES_PER_PIXEL * self.width * self.height

    def decode(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Decode the frames of these indices, ascending and possibly repeated -> (height, width, 3) each, upright."""
        context = self._stream.codec_context
        context.options = {"max_pixels": str(self._limits.max_image_pixels)}
        context.thread_count = 1  # other items are decoded at the same time
        times = [self._times[index] for index in indices]
        orientation = None
        for frame in _decode_frames(context, self._packets, times, self._deadline, self._limits):
            if orientation is None:
                orientation = UPRIGHT if self._limits.raw_orientation else _orientation(frame)
            yield turn_values(_rgb_values(frame), orientation)


@contextmanager
def open_clip(data: bytes, limits: MediaLimits, deadline: float) -> Iterator[OpenClip]:
    """Open a video and read its packets. Raises `InvalidMedia` and `MediaTooLarge`, also inside the `with` block."""
    # Above its max_pixels FFmpeg reports no frame size. The larger value lets our error name the size.
    options = {"max_pixels": str(PROBE_PIXELS_FACTOR * limits.max_image_pixels)}
    try:
        with av.open(
            io.BytesIO(data),
            "r",
            format=_container_format(data),
            options=options,
            metadata_errors="ignore",
            timeout=limits.decode_timeout_s,  # bounds FFmpeg's loops over packets
        ) as container:
            yield OpenClip(container, limits, deadline)
    except MemoryError as error:  # FFmpeg's is an FFmpegError too
        raise TooLittleMemory("decoding the video takes too much memory; it is too large, or damaged") from error
    except av.FFmpegError as error:
        check_deadline(deadline, limits)  # FFmpeg reports its timeout as an error too
        raise InvalidMedia(f"video cannot be decoded; it is damaged or cut off: {error.strerror}") from error


def _orientation(frame: VideoFrame) -> int:
    """EXIF's number for the display matrix that FFmpeg passes from the container to each frame."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return matrix_orientation(struct.unpack("=9i", matrix)) if isinstance(matrix, SideData) else UPRIGHT


def _rgb_values(frame: VideoFrame) -> NDArray[np.uint8]:
    plane = frame.reformat(format="rgb24", threads=1).planes[0]
    rows: NDArray[np.uint8] = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, abs(plane.line_size))
    values = rows[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)
    return values[::-1] if plane.line_size < 0 else values  # a negative line size: from bottom to top


def _container_format(data: bytes) -> str:
    """FFmpeg's name of the container. Raises `InvalidMedia` for other formats, and for a file that is cut off."""
    found = find_format(data)
    if found is None or not found.ffmpeg:
        raise InvalidMedia(unsupported_format("video", data))
    match found.ffmpeg:
        case "mov":
            _check_mp4(data)
        case "matroska":
            _check_matroska(data)
        case "gif" if not data.rstrip(b"\0\r\n").endswith(b";"):
            raise InvalidMedia("video is cut off: the end of the GIF is missing")
    return found.ffmpeg


def _check_mp4(data: bytes) -> None:
    """Check that the boxes of an MP4 are complete, and that its index is not too large once FFmpeg expands it."""
    position = num_boxes = num_entries = 0
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size == 1 and position + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, position + 8)
        end = position + size if size else len(data)
        if end > len(data):
            raise InvalidMedia(
                f"video is cut off: its {kind.decode('latin-1')} box ends at byte {end}; received {len(data)} bytes"
            )
        if end < position + 8:
            raise InvalidMedia(f"video is damaged: a box of {size} bytes at byte {position}")
        if kind != b"mdat":
            num_entries += _count_index_entries(data, position, end)
        position = end
        num_boxes += 1
        if num_entries > MAX_INDEX_ENTRIES or num_boxes > MAX_BOXES:
            raise MediaTooLarge(
                f"video with an index of at least {num_entries} entries in {num_boxes} boxes; "
                f"allowed: up to {MAX_INDEX_ENTRIES} entries in {MAX_BOXES} boxes"
            )


def _count_index_entries(data: bytes, start: int, end: int) -> int:
    """Number of entries that the sample tables of a box declare; a table can declare more than it stores."""
    if data.find(b"cmov", start, end) >= 0:
        raise InvalidMedia("video with a compressed header (cmov); allowed: MP4 or MOV with an uncompressed header")
    total = 0
    for kind, offset, limit in ((b"stsz", 12, MAX_TABLES), (b"stz2", 12, MAX_TABLES), (b"trun", 8, MAX_BOXES)):
        for place in _find_all(data, kind, start, end, limit):
            total += int.from_bytes(data[place + offset : place + offset + 4])
    for kind in (b"stts", b"ctts"):  # run-length encoded: number of samples, duration or offset
        for place in _find_all(data, kind, start, end, MAX_TABLES):
            num_runs = min(int.from_bytes(data[place + 8 : place + 12]), max(0, end - place - 12) // 8)
            runs = np.frombuffer(data, ">u4", 2 * num_runs, place + 12) if num_runs else np.empty(0, np.uint32)
            total += int(runs[::2].sum(dtype=np.int64))
    return total


def _find_all(data: bytes, kind: bytes, start: int, end: int, limit: int) -> Iterator[int]:
    """Positions of the bytes `kind`. Raises `MediaTooLarge` at the limit."""
    for _ in range(limit):
        start = data.find(kind, start, end)
        if start < 0:
            return
        yield start
        start += len(kind)
    raise MediaTooLarge(f"video with {limit} or more {kind.decode()} tables; allowed: fewer")


def _check_matroska(data: bytes) -> None:
    """Check that the segment has the length it declares. A segment of unknown length (a live recording) passes."""
    start = data.find(_MATROSKA_SEGMENT, 0, 4096) + len(_MATROSKA_SEGMENT)
    if start < len(_MATROSKA_SEGMENT) or start >= len(data):
        raise InvalidMedia("video is damaged: a Matroska header without a segment")
    num_bytes = 9 - data[start].bit_length()  # leading zero bits give the length of the size field
    size = int.from_bytes(data[start : start + num_bytes]) & ~(1 << 7 * num_bytes)
    end = start + num_bytes + size
    if size != (1 << 7 * num_bytes) - 1 and end > len(data):
        raise InvalidMedia(f"video is cut off: its segment ends at byte {end}; received {len(data)} bytes")


def _video_stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    """The first video stream that is not a cover image. Raises unless its codec and size are allowed."""
    streams = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise InvalidMedia(f"video without a video stream (found: {kinds}); allowed: at least one frame")
    stream = streams[0]
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
    if codec not in VIDEO_CODECS:
        raise InvalidMedia(f"video of codec {codec}; allowed: {', '.join(VIDEO_CODECS)}")
    width, height = stream.width, stream.height
    check_num_pixels("video", width, height, limits)
    if not width or not height:
        raise MediaTooLarge(
            f"video with an unreadable frame size, or over {PROBE_PIXELS_FACTOR * limits.max_image_pixels} pixels; "
            f"allowed: up to {limits.max_image_pixels} (EMBEDDER_MAX_IMAGE_PIXELS)"
        )
    return stream


def _read_packets(
    container: InputContainer, stream: VideoStream, deadline: float, limits: MediaLimits
) -> list[Packet[Any]]:
    """Every coded frame, in decoding order. Bytes are counted, because an index can refer to the same bytes often."""
    packets: list[Packet[Any]] = []
    num_bytes = 0
    for packet in container.demux():
        check_deadline(deadline, limits)
        num_bytes += packet.size
        if isinstance(packet.stream, VideoStream) and packet.stream.index == stream.index and packet.size:
            packets.append(packet)
        if len(packets) > MAX_CODED_FRAMES:
            raise MediaTooLarge(f"video of more than {MAX_CODED_FRAMES} frames; allowed: up to {MAX_CODED_FRAMES}")
        if num_bytes > limits.max_video_bytes:
            raise MediaTooLarge(
                f"video of more than {num_bytes} bytes when unpacked; "
                f"allowed: up to {limits.max_video_bytes} (EMBEDDER_MAX_VIDEO_BYTES)"
            )
    for index, packet in enumerate(packets):
        if packet.is_corrupt or packet.pts is None:
            raise InvalidMedia(f"video is damaged or cut off at its frame {index}")
    if len(packets) < stream.frames:
        raise InvalidMedia(f"video is cut off: received {len(packets)} of its {stream.frames} frames")
    return packets


def _timeline(packets: list[Packet[Any]], stream: VideoStream) -> tuple[list[int], float]:
    """Timestamps of the visible frames, in order, and the frame rate.

    The reference's readers take the frame rate from the header. It is used if the timestamps agree within 2%;
    otherwise the rate is computed from the timestamps.
    """
    visible = sorted((packet.pts or 0, packet.duration or 0) for packet in packets if _is_visible(packet, stream))
    if not visible:
        raise InvalidMedia("video of 0 frames; allowed: at least 1")
    times = [pts for pts, _ in visible]
    span = times[-1] - times[0]
    ticks = span + (visible[-1][1] or span / max(1, len(times) - 1))
    header = float(stream.average_rate or 0)
    measured = len(times) / (ticks * float(stream.time_base or 0)) if ticks and stream.time_base else header
    if not measured:
        raise InvalidMedia("video without timestamps or frame rate; allowed: with one of them")
    return times, header if abs(header - measured) <= 0.02 * measured else measured


def _is_visible(packet: Packet[Any], stream: VideoStream) -> bool:
    """False for frames that an edit list removes, and for VP8 frames that serve only as references."""
    is_hidden = stream.codec_context.codec.canonical_name == "vp8" and not bytes(packet)[0] & 0x10
    return not packet.is_discard and not is_hidden


def _decode_frames(
    context: VideoCodecContext,
    packets: list[Packet[Any]],
    times: list[int],
    deadline: float,
    limits: MediaLimits,
) -> Iterator[VideoFrame]:
    """Decode the frames at `times` (ascending), skipping groups of pictures without one."""
    context.open(strict=False)
    can_skip = context.codec.canonical_name in ("h264", "hevc")  # one packet at a time
    for start, wanted in _decoding_runs(packets, times):
        for packet in itertools.chain(packets[start:], [None]):
            check_deadline(deadline, limits)
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


def _decoding_runs(packets: list[Packet[Any]], times: list[int]) -> list[tuple[int, list[int]]]:
    """Indices of the packets where decoding starts, each with the times of the frames to decode from there.

    Decoding a frame starts at the last key frame before it in decoding order, or, if that key frame is displayed
    later than the frame (a leading picture of an open group), at the one before.
    """
    index_of = {packet.pts: index for index, packet in enumerate(packets)}
    keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    runs: list[tuple[int, list[int]]] = []
    last = -1
    for pts in times:
        number = bisect_right(keys, index_of[pts]) - 1
        while number > 0 and (packets[keys[number]].pts or 0) > pts:
            number -= 1
        start = keys[number] if number >= 0 else 0
        if not runs or start > last:
            runs.append((start, []))
        runs[-1][1].append(pts)
        last = max(last, index_of[pts])
    return runs
