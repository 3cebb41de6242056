"""Videos give the frames, sizes and times of the reference; other bytes are refused with the reason."""

from __future__ import annotations

import base64
import io
import random
import struct
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from av.video.stream import VideoStream
from numpy.typing import NDArray

from embedder import Embedder
from embedder.errors import InvalidMedia, InvalidRequest, MediaTooLarge
from embedder.inputs import clip as clip_module
from embedder.inputs import video
from embedder.inputs.clip import MAX_INDEX_ENTRIES
from embedder.inputs.items import Video
from embedder.inputs.regimes import CheckpointRegime
from embedder.inputs.video import load_video
from embedder.settings import Settings
from tests.conftest import encoded, picture, slow_except
from tests.model.test_parity import assert_equal
from tests.oracle import Oracle

CHECKPOINT = CheckpointRegime(max_frames=8)
SETTINGS = Settings(max_image_pixels=1_000_000, max_image_bytes=200_000)
VP8 = {"auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "realtime", "threads": "1"}  # several spin: 2 s a clip
KINDS = {  # container, codec, pixel format, options
    "mpeg4 in MP4": ("mp4", "mpeg4", "yuv420p", {"bf": "2"}),
    "H.264 in MP4": ("mp4", "libx264", "yuv420p", {"x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "H.264 in MOV": ("mov", "libx264", "yuv420p", {}),
    "H.264 in fragments": ("mp4", "libx264", "yuv420p", {}),
    "H.264 in Matroska": ("matroska", "libx264", "yuv420p", {}),
    "H.265 in MP4": ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "VP8 in WebM": ("webm", "libvpx", "yuv420p", VP8),
    "VP9 in WebM": ("webm", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "Motion JPEG in Matroska": ("matroska", "mjpeg", "yuvj420p", {}),
    "ProRes in MOV": ("mov", "prores", "yuv422p10le", {}),
    "GIF": ("gif", "gif", "rgb8", {}),
}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def clip(
    kind: str = "H.264 in MP4",
    num_frames: int = 50,
    rate: Fraction | int = 25,
    width: int = 128,
    height: int = 96,
    group: int = 12,
) -> bytes:
    """An encoded video of a moving bar on a background that gets lighter, with a key frame every `group` frames."""
    container_format, codec, pixel_format, options = KINDS[kind]
    container_options = FRAGMENTS if kind == "H.264 in fragments" else {}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format, options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = group
        for index in range(num_frames):
            values = np.full((height, width, 3), 40 + index * 4 % 200, np.uint8)
            values[:, index * 3 % width :][:, :10] = (250, 20, index * 7 % 256)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def every_frame(data: bytes) -> list[PIL.Image.Image]:
    """All frames of a video, decoded in order."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def audio(container_format: str = "mp4") -> bytes:
    """Audio: a second of silence."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream("aac" if container_format == "mp4" else "libopus", rate=48000)
        frame = av.AudioFrame(format="fltp" if container_format == "mp4" else "s16", layout="stereo", samples=1024)
        frame.sample_rate = 48000
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def load(data: bytes | str, fps: float | None = None, settings: Settings | None = None) -> video.Clip:
    return load_video(Video(data, fps), CheckpointRegime(), settings or Settings())


# Against the reference


PARITY: dict[str, Callable[[], dict[str, Any]]] = {
    **{kind: (lambda kind=kind: {"video": clip(kind, 60)}) for kind in KINDS},
    "sides that are no multiple of 32": lambda: {"video": clip(width=150, height=70)},
    "below the model's minimum": lambda: {"video": clip(width=32, height=48)},
    "portrait, in Matroska": lambda: {"video": clip("H.264 in Matroska", width=64, height=160)},
    "NTSC": lambda: {"video": clip(num_frames=121, rate=Fraction(30000, 1001), width=64, height=64)},
    "NTSC in WebM": lambda: {
        "video": clip("VP9 in WebM", num_frames=121, rate=Fraction(30000, 1001), width=64, height=64)
    },
    "one frame a second": lambda: {"video": clip(num_frames=7, rate=1)},
    "less than a frame a second": lambda: {"video": clip(num_frames=9, rate=Fraction(1, 2), width=64, height=64)},
    "three frames": lambda: {"video": clip(num_frames=3)},
    "two frames": lambda: {"video": clip(num_frames=2)},
    "over the frame limit": lambda: {"video": clip(num_frames=141, rate=2, width=64, height=64)},
    "with text": lambda: {"video": clip(), "text": "what moves"},
    "clips and pictures in order": lambda: {
        "content": [
            {"type": "text", "text": "first "},
            {"type": "video", "video": clip("VP9 in WebM", width=64, height=96), "fps": 2},
            {"type": "image", "image": picture(70, 50)},
            {"type": "video", "video": [picture(64, 64, 1), picture(64, 64, 2)]},
            {"type": "video", "video": clip(num_frames=30, width=96, height=64)},
            {"type": "text", "text": " last"},
        ]
    },
}


@pytest.fixture(scope="module")
def oracle(random_checkpoint: Path) -> Oracle:
    return Oracle(random_checkpoint)


@pytest.mark.parametrize("name", PARITY)
def test_encoded_video_equals_transformers(name: str, embedder: Embedder, oracle: Oracle) -> None:
    item = PARITY[name]()
    assert_equal(embedder.embed([item]), oracle.embed([item]))


def test_every_form_of_a_video_gives_the_same_vector(embedder: Embedder) -> None:
    data = clip("H.264 in MP4", 30)
    text = base64.b64encode(data).decode()
    forms = [data, text, f"data:video/mp4;base64,{text}", [f"data:video/mp4;base64,{text}"]]
    first, *others = [embedder.embed([{"video": form}])[0] for form in forms]
    assert all(np.array_equal(other, first) for other in others)


def test_times_are_frame_numbers_divided_by_the_frame_rate() -> None:
    loaded = load(clip(num_frames=50, rate=25))
    assert loaded.seconds == (0.0, 16 / 25, 33 / 25, 49 / 25)  # four frames at least, of two seconds


def test_frame_rate_of_the_header_is_ignored_if_the_timestamps_contradict_it() -> None:
    data = bytearray(clip("VP9 in WebM", 50, width=64, height=64))
    place = data.index(b"\x23\xe3\x83\x84")  # DefaultDuration, in nanoseconds
    data[place + 4 : place + 8] = struct.pack(">I", 1_000_000)  # a thousand frames a second
    assert load(bytes(data)).seconds[-1] == pytest.approx(49 / 25, rel=0.02)


def test_single_frame_is_taken_twice() -> None:
    for kind in ("H.264 in MP4", "VP9 in WebM", "GIF"):
        loaded = load(clip(kind, 1))
        assert np.array_equal(loaded.frames[0], loaded.frames[1])
        assert (len(loaded.frames), loaded.seconds) == (2, (0.0, 0.0))


def test_channels_of_a_frame_are_one_after_the_other() -> None:
    for kind in ("H.264 in MP4", "GIF"):
        assert load(clip(kind)).frames.transpose(0, 3, 1, 2).flags.c_contiguous


# Only what is needed is decoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", slow_except([7, 250], 7))
def test_frames_equal_those_of_decoding_everything(kind: str, group: int) -> None:
    data = clip(kind, 120, group=group)
    images = every_frame(data)
    for fps in (1.0, 6.0):
        indices = CheckpointRegime().sample_encoded(len(images), 25, fps).indices
        loaded = load(data, fps)
        assert loaded.seconds == tuple(index / 25 for index in indices)
        assert np.array_equal(loaded.frames, np.stack([np.asarray(images[index]) for index in indices]))


class Counting:
    """A codec context that counts packets and frames."""

    def __init__(self, context: Any) -> None:
        self.__dict__.update(context=context, num_packets=0, num_frames=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.context, name, value)

    def decode(self, packet: Any) -> Any:
        frames = self.context.decode(packet)
        self.__dict__["num_packets"] += 1
        self.__dict__["num_frames"] += len(frames)
        return frames


@pytest.mark.parametrize(
    ("kind", "group", "max_packets"),
    [("Motion JPEG in Matroska", 1, 4), ("VP9 in WebM", 10, 44), ("H.264 in MP4", 10, 40), ("H.264 in MP4", 999, 501)],
)
def test_groups_without_a_sampled_frame_are_skipped(kind: str, group: int, max_packets: int) -> None:
    data = clip(kind, 500, group=group, width=64, height=64)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        times = sorted(packet.pts or 0 for packet in packets)
        wanted = [times[index] for index in (0, 166, 333, 499)]
        context = Counting(stream.codec_context)
        frames = list(clip_module._decode_frames(context, packets, wanted, float("inf"), Settings()))  # type: ignore[arg-type]
    assert [frame.pts for frame in frames] == wanted
    assert context.num_packets <= max_packets
    if kind.startswith("H.264"):
        assert context.num_frames < 0.75 * context.num_packets  # frames that no other depends on are skipped


# Limits and errors


def test_video_over_the_limit_of_bytes_is_refused_before_decoding() -> None:
    data = clip()
    settings = Settings(max_video_bytes=len(data) - 1)
    message = rf"^video of {len(data)} bytes; allowed: up to {len(data) - 1} \(EMBEDDER_MAX_VIDEO_BYTES\)$"
    with pytest.raises(MediaTooLarge, match=message):
        load(data, settings=settings)
    with pytest.raises(
        MediaTooLarge, match=r"^video of (about )?\d+ bytes; allowed: up to \d+ \(EMBEDDER_MAX_VIDEO_BYTES\)$"
    ):
        load(base64.b64encode(data).decode(), settings=settings)
    assert len(load(data, settings=Settings(max_video_bytes=len(data))).frames) == 4


def test_video_over_the_limit_of_pixels_is_refused_by_its_header() -> None:
    for kind in KINDS:
        with pytest.raises(
            MediaTooLarge, match=r"^video of 128x96 = 12288 pixels; allowed: up to 12287 \(EMBEDDER_MAX_IMAGE_PIXELS\)$"
        ):
            load(clip(kind, 4), settings=Settings(max_image_pixels=12287))


def test_frames_larger_than_their_header_says_are_refused() -> None:
    data = clip("VP9 in WebM", 20, width=512, height=512)
    size = b"\xb0\x82\x02\x00\xba\x82\x02\x00"  # PixelWidth and PixelHeight of 512
    assert size in data
    lie = data.replace(size, b"\xb0\x82\x00\x40\xba\x82\x00\x40")
    with pytest.raises((InvalidMedia, MediaTooLarge)):
        load(lie, settings=Settings(max_image_pixels=512 * 512 - 1))


def test_time_to_decode_is_limited() -> None:
    with pytest.raises(
        MediaTooLarge, match=r"^decoding took more than 1e-09 s \(EMBEDDER_DECODE_TIMEOUT_S\); send smaller"
    ):
        load(clip(), settings=Settings(decode_timeout_s=1e-9))


def test_number_of_coded_frames_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_module, "MAX_CODED_FRAMES", 49)
    with pytest.raises(MediaTooLarge, match=r"^video of more than 49 frames; allowed: up to 49$"):
        load(clip(num_frames=50))
    assert load(clip(num_frames=49)).frames.shape[1:] == (96, 128, 3)


def with_table(data: bytes, kind: bytes, offset: int, values: tuple[int, ...]) -> bytes:
    place = data.index(kind) + offset
    return data[:place] + struct.pack(f">{len(values)}I", *values) + data[place + 4 * len(values) :]


def with_offset(index: bytes, by: int) -> bytes:
    """An MP4's index for samples that lie elsewhere, all in one chunk."""
    (offset,) = struct.unpack_from(">I", index, index.index(b"stco") + 12)
    return with_table(index, b"stco", 12, (offset + by,))


@pytest.mark.parametrize(
    ("kind", "table", "offset", "values"),
    [
        ("H.264 in MP4", b"stsz", 8, (1, 100_000_000)),
        ("H.264 in MP4", b"stts", 12, (400_000_000, 1)),
        ("H.264 in fragments", b"trun", 8, (400_000_000,)),
    ],
)
def test_index_that_declares_too_many_entries_is_refused(
    kind: str, table: bytes, offset: int, values: tuple[int, ...]
) -> None:
    with pytest.raises(
        MediaTooLarge,
        match=rf"^video with an index of at least \d+ entries in \d+ boxes; allowed: up to {MAX_INDEX_ENTRIES} ",
    ):
        load(with_table(clip(kind), table, offset, values))


def test_small_file_that_would_take_gigabytes_is_refused_before_it_is_opened() -> None:
    count = 60_000_000  # samples of one byte in one chunk
    data = with_table(clip(), b"stsz", 8, (1, count))
    data = with_table(with_table(data, b"stsc", 16, (count,)), b"stts", 12, (count, 1))
    with pytest.raises(
        MediaTooLarge, match=r"^video with an index of at least 12\d{7} entries in \d boxes; allowed: up to 2000000 "
    ):
        load(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\x08free" * 1_000_000,
        b"\0\0\0\x08ftyp\0\0\0\0moov" + b"stts\0\0\0\0\xff\xff\xff\xff" * 1_000_000,
        b"\0\0\0\0moov" + b"stsz" * 1_000_000,
        b"\x1aE\xdf\xa3" + b"\x18\x53\x80\x67\xff" * 100_000,
        b"GIF89a" + b";" * 1_000_000,
    ],
)
def test_file_of_only_structure_is_refused_quickly(data: bytes) -> None:
    start = time.thread_time()
    with pytest.raises((InvalidMedia, MediaTooLarge)):
        load(data)
    assert time.thread_time() - start < 5


def test_bytes_that_an_index_repeats_are_counted_each_time() -> None:
    data = clip("H.264 in MP4", 50)
    place = data.index(b"stsz") + 12
    sizes = struct.unpack_from(">50I", data, place)
    first = struct.pack(">50I", *(max(sizes),) * 50)  # overlapping samples
    with pytest.raises((InvalidMedia, MediaTooLarge)):
        load(data[:place] + first + data[place + 200 :], settings=Settings(max_video_bytes=len(data)))


def test_audio_without_video_is_refused() -> None:
    with pytest.raises(
        InvalidMedia, match=r"^video without a video stream \(found: audio\); allowed: at least one frame$"
    ):
        load(audio())
    with pytest.raises(
        InvalidMedia, match=r"^video without a video stream \(found: audio\); allowed: at least one frame$"
    ):
        load(audio("webm"))


@pytest.mark.parametrize("kind", ["H.264 in fragments", "H.264 in Matroska", "VP9 in WebM"])
def test_video_without_frames_is_refused(kind: str) -> None:
    with pytest.raises(InvalidMedia):
        load(clip(kind, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_video_that_is_cut_off_is_refused(kind: str) -> None:
    data = clip(kind, 60, width=64, height=64)
    for share in (0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.999):
        with pytest.raises(InvalidMedia, match=r"cut off|damaged|^video: not an? "):
            load(data[: int(len(data) * share)])


def test_missing_frames_are_noticed_with_the_index_first() -> None:
    data = clip(num_frames=60)  # ftyp, free, mdat, moov: the index points at bytes that stay where they are
    start, end = data.index(b"mdat") - 4, data.index(b"moov") - 4
    index = data[end:]
    head = data[: start - 8]  # without the free box, so that the index is one box later by its own length
    shifted = with_offset(index, len(head) + len(index) + 8 - (start + 8))
    moved = head + shifted + data[start:end]
    assert np.array_equal(load(moved).frames, load(data).frames)
    with pytest.raises(
        InvalidMedia, match=rf"^video is cut off: its mdat box ends at byte {len(moved)}; received \d+ bytes"
    ):
        load(moved[: len(moved) * 3 // 4])


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"%PDF-1.7 and more", ", but a PDF document"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), ", but a PNG image"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1\nfile:///etc/hostname\n", ""),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", ""),
        (b"RIFF\x00\x00\x00\x00AVI LIST", ", but an AVI video"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(20), ", but an AVIF image"),
        (b"\x00\x00\x00\x1cftypheic" + bytes(20), ", but a HEIC image"),
    ],
)
def test_other_formats_are_refused_by_their_first_bytes(data: bytes, found: str) -> None:
    with pytest.raises(InvalidMedia) as caught:
        load(data)
    assert str(caught.value).startswith(f"video: not a GIF, MP4, MOV, WebM or Matroska file{found} (starts with '")


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "file:///etc/hostname", "clip.mp4", "rtsp://host/a", "https://host/a", "pipe:0"]
)
def test_path_or_url_is_not_opened(name: str) -> None:
    with pytest.raises(InvalidMedia, match=r"^video(: not a GIF| is not valid base64)"):
        load(name)


def test_codec_outside_the_list_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(InvalidMedia, match=r"^video of codec ffv1; allowed: h264, hevc,"):
        load(buffer.getvalue())


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_video_gives_a_video_or_an_invalid_request(kind: str) -> None:
    data = clip(kind, 30, width=64, height=64)
    generator = random.Random(kind)
    settings = Settings(max_video_bytes=10 * len(data), max_image_pixels=1_000_000, decode_timeout_s=5)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 3, 30])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        try:
            loaded = load(bytes(damaged), settings=settings)
        except InvalidRequest:
            continue
        assert len(loaded.frames) % 2 == 0
        assert len(loaded.frames) == len(loaded.seconds)


# Lists of frames


def test_frames_of_several_sizes_are_refused() -> None:
    message = r"^video of frames of 64x64, 96x64 pixels; allowed: frames of one size$"
    with pytest.raises(InvalidMedia, match=message):
        load_list(picture(64, 64), picture(96, 64), picture(64, 64))


def load_list(*frames: Any, **options: Any) -> NDArray[np.uint8]:
    return load_video(Video(frames, **options), CHECKPOINT, SETTINGS).frames


@pytest.mark.parametrize(("num_given", "num_loaded"), [(1, 2), (2, 2), (3, 4), (8, 8)])
def test_odd_number_of_frames_is_made_even_by_repeating_the_last(num_given: int, num_loaded: int) -> None:
    frames = [picture(64, 64, seed) for seed in range(num_given)]
    loaded = load_list(*frames)
    assert len(loaded) == num_loaded
    for index, values in enumerate(loaded):
        assert np.array_equal(values, np.asarray(frames[min(index, num_given - 1)]))


def test_frames_can_be_given_in_every_form_of_an_image() -> None:
    image = picture(64, 64)
    data = encoded(image)
    loaded = load_list(image, data, base64.b64encode(data).decode(), encoded(image.convert("RGBA")))
    assert all(np.array_equal(values, np.asarray(image)) for values in loaded)


@pytest.mark.parametrize("num_frames", [0, 9])
def test_number_of_frames_is_limited(num_frames: int) -> None:
    with pytest.raises(InvalidMedia, match=f"^video of {num_frames} frames; allowed: 1 to 8$"):
        load_list(*[picture(64, 64)] * num_frames)


def test_bad_frame_refuses_the_video() -> None:
    with pytest.raises(InvalidMedia, match="a PDF document"):
        load_list(picture(64, 64), b"%PDF-1.7")
    with pytest.raises(MediaTooLarge):
        load_list(picture(64, 64), encoded(PIL.Image.new("1", (2000, 600))))


def test_list_has_two_frames_per_second_by_default() -> None:
    frames = tuple(picture(64, 64, seed) for seed in range(3))
    assert load_video(Video(frames), CHECKPOINT, SETTINGS).seconds == (0.0, 0.5, 1.0, 1.0)
    assert load_video(Video(frames, fps=4.0), CHECKPOINT, SETTINGS).seconds == (0.0, 0.25, 0.5, 0.5)
