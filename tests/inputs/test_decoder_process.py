"""A decoding process gives the same pixels as a thread; whatever happens to it, only its own item fails."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from embedder import Embedder
from embedder.errors import EmbedderError, EngineFailed, InvalidMedia, MediaTooLarge, SystemLimitReached
from embedder.inputs.decoder import NeedsProcess
from embedder.inputs.decoder_process import RETRY_BYTES, START_BYTES, DecoderProcess, ProcessDecoder
from embedder.inputs.image import load_image
from embedder.inputs.items import EmbeddingItem, Image, Video
from embedder.inputs.limits import FixedLimits
from embedder.inputs.regimes import CheckpointRegime
from embedder.inputs.shared_memory import memory_file
from embedder.inputs.tokens import item_ids
from embedder.inputs.video import load_video
from embedder.settings import Settings
from tests.conftest import ROOT, encoded, picture
from tests.inputs import ending_worker, hostile_clips
from tests.inputs.hostile import avif_of_frames, chunk, gif_of_comments, jpeg_of_scans, png, rle_bmp
from tests.inputs.hostile_clips import clip_of_two_sizes, hanging_clip
from tests.inputs.test_video import KINDS, clip

REGIME = CheckpointRegime()
SETTINGS = Settings(decode_timeout_s=60)
GOOD = clip(num_frames=20)


class Decoding:
    """A process, why it was replaced, and functions that decode with it."""

    def __init__(self, settings: Settings) -> None:
        self.ended: list[str] = []
        self.settings = settings
        self.process = DecoderProcess(settings, self.ended.append)

    def load(self, data: bytes, num_bytes: int = START_BYTES, grow: Callable[[int], bool] = lambda _: True) -> Any:
        decoder = ProcessDecoder(self.process, num_bytes, grow)
        try:
            return load_video(Video(data), REGIME, self.settings, decoder=decoder).frames
        finally:
            decoder.close()

    def load_image(self, data: bytes) -> Any:
        decoder = ProcessDecoder(self.process, START_BYTES, lambda _: True)
        try:
            return load_image(data, REGIME, self.settings, decoder=decoder)
        finally:
            decoder.close()

    def limit(self, settings: Settings) -> None:
        """Other limits, for this side only: a process has those with which it was started."""
        self.settings = settings
        self.process.limits = FixedLimits.of(settings)

    @property
    def pid(self) -> int:
        assert self.process._process is not None
        return self.process._process.pid


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoding]:
    decoding = Decoding(SETTINGS)
    yield decoding
    decoding.process.close()
    decoding.process.stop()


@pytest.fixture
def decoding(shared: Decoding) -> Decoding:
    """A process that runs, and was not replaced yet."""
    shared.limit(SETTINGS)
    shared.process.start()
    shared.ended.clear()
    shared.process._num_items = 0
    return shared


@pytest.fixture(scope="module")
def good() -> Any:
    return load_video(Video(GOOD), REGIME, SETTINGS).frames


def peak_bytes(pid: int) -> int:
    """The largest resident memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_kind_of_clip_has_the_frames_of_a_thread(decoding: Decoding) -> None:
    for kind in KINDS:
        data = clip(kind)
        assert np.array_equal(decoding.load(data), load_video(Video(data), REGIME, SETTINGS).frames), kind
    assert decoding.ended == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(gif_of_comments(picture(300, 200)), id="GIF"),
        pytest.param(rle_bmp(300, 200), id="RLE BMP"),
        pytest.param(png(64, 64, bytes(64 * 193), more=chunk(b"tEXt", b"a\0b") * 1000), id="PNG"),
        pytest.param(jpeg_of_scans(picture(300, 200), 40), id="JPEG of many scans"),
        pytest.param(encoded(picture(4200, 4200), "JPEG"), id="large JPEG"),
        pytest.param(encoded(picture(2700, 2700), "WEBP"), id="large WebP"),
        pytest.param(avif_of_frames(picture(300, 200), 2), id="AVIF of two frames"),
        pytest.param(encoded(picture(300, 200), "HEIF"), id="HEIC"),
        pytest.param(encoded(picture(300, 200).convert("CMYK"), "TIFF", compression="tiff_lzw"), id="TIFF"),
        pytest.param(encoded(picture(300, 200).convert("1"), "TIFF", compression="group4"), id="fax"),
        pytest.param(encoded(picture(128, 128), "ICO"), id="ICO"),
        pytest.param(encoded(picture(128, 128), "ICO", bitmap_format="bmp"), id="ICO of a bitmap"),
    ],
)
def test_image_has_the_pixels_of_a_thread(data: bytes, decoding: Decoding) -> None:
    assert np.array_equal(decoding.load_image(data), load_image(data, REGIME, SETTINGS))
    assert decoding.process._num_items == 1


@pytest.mark.parametrize("kinds", [("GIF", "PNG", None), ("PNG", "GIF", "GIF"), ("GIF", "GIF"), ("PNG", "PNG", "GIF")])
def test_frames_of_a_list_are_decoded_where_each_belongs(kinds: tuple[str | None, ...], decoding: Decoding) -> None:
    images = [picture(64, 64, seed) for seed in range(len(kinds))]
    makers = {"GIF": gif_of_comments, "PNG": encoded, None: lambda image: image}
    frames = tuple(makers[kind](image) for image, kind in zip(images, kinds, strict=True))
    decoder = ProcessDecoder(decoding.process, START_BYTES, lambda _: True)
    loaded = load_video(Video(frames), REGIME, SETTINGS, decoder=decoder)
    decoder.close()
    assert np.array_equal(loaded.frames, load_video(Video(frames), REGIME, SETTINGS).frames)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(hanging_clip, id="pictures in a packet"),
        pytest.param(partial(hostile_clips.many_tags, 200_000), id="tags", marks=pytest.mark.slow),
        pytest.param(partial(hostile_clips.many_metadata, 200_000), id="metadata", marks=pytest.mark.slow),
    ],
)
def test_clip_that_holds_ffmpeg_is_cut_off_at_the_deadline(
    make: Callable[[], bytes], good: Any, decoding: Decoding
) -> None:
    data = make()
    pid = decoding.pid
    decoding.limit(Settings(decode_timeout_s=1))
    with pytest.raises(MediaTooLarge, match=r"^decoding took more than 1 s \(EMBEDDER_DECODE_TIMEOUT_S\)"):
        decoding.load(data)
    if decoding.ended:  # or it noticed the deadline by itself
        assert decoding.ended == ["deadline"]
        assert not is_running(pid)
    decoding.limit(SETTINGS)
    assert np.array_equal(decoding.load(GOOD), good)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            partial(hostile_clips.encrypted_samples, 100_000_000), id="encrypted samples", marks=pytest.mark.slow
        ),
        pytest.param(partial(hostile_clips.encrypted_samples, 100_000_000, 4), id="encrypted samples of four tracks"),
        pytest.param(partial(hostile_clips.many_attachments, 5_000_000), id="attachments"),
        pytest.param(partial(hostile_clips.many_chapters, 5_000_000), id="chapters", marks=pytest.mark.slow),
        pytest.param(partial(hostile_clips.many_cues, 5_000_000), id="cues", marks=pytest.mark.slow),
    ],
)
def test_clip_that_takes_gigabytes_is_refused_within_its_memory(
    make: Callable[[], bytes], good: Any, decoding: Decoding
) -> None:
    data = make()
    idle = peak_bytes(decoding.pid)
    pid = decoding.pid
    with pytest.raises((NeedsProcess, InvalidMedia, MediaTooLarge)):
        decoding.load(data)
    if decoding.pid == pid:
        assert peak_bytes(pid) < idle + START_BYTES + 2**27
    with pytest.raises((InvalidMedia, MediaTooLarge)):
        decoding.load(data, RETRY_BYTES)
    assert np.array_equal(decoding.load(GOOD), good)


def test_tokens_of_media_are_counted_in_a_process(embedder: Embedder) -> None:
    small = clip(num_frames=20)
    parts = (Video(small, 6), Image(rle_bmp(200, 100)), Video((encoded(picture(64, 64)),) * 3))
    counted = item_ids(EmbeddingItem(parts), embedder.preprocessor)
    assert counted == list(embedder.preprocessor(EmbeddingItem(parts)).input_ids)
    with pytest.raises(MediaTooLarge, match=r"more than 512 MiB of memory"):
        item_ids(EmbeddingItem((Video(hostile_clips.encrypted_samples(100_000_000, 4)),)), embedder.preprocessor)


def test_item_says_how_much_memory_it_needs(decoding: Decoding) -> None:
    data = clip(num_frames=4, width=1920, height=1088)
    asked: list[int] = []

    def refuse(num_bytes: int) -> bool:
        asked.append(num_bytes)
        return False

    with pytest.raises(NeedsProcess) as caught:
        decoding.load(data, 2**24, refuse)
    assert asked == [caught.value.num_bytes]
    assert 40 * 1920 * 1088 < asked[0] < 80 * 1920 * 1088
    assert len(decoding.load(data, asked[0], refuse)) == 4
    assert len(asked) == 1
    assert len(decoding.load(data, 2**24)) == 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_process_that_dies_fails_its_own_item_only(number: int, good: Any, decoding: Decoding) -> None:
    threading.Timer(0.3, os.kill, (decoding.pid, number)).start()
    with pytest.raises(InvalidMedia, match=r"^the decoder failed on this file \(status -\d+\)"):
        decoding.load(hanging_clip())
    assert decoding.ended == ["crash"]
    assert np.array_equal(decoding.load(GOOD), good)


def test_process_that_ends_by_itself_counts_as_failed_and_not_as_killed() -> None:
    """The item of a killed one would be decoded again, and its status would hide what has happened."""
    reasons: list[str] = []
    process = DecoderProcess(SETTINGS, reasons.append, ending_worker.__name__)
    process.start()
    process.send(type="open")
    with pytest.raises(InvalidMedia, match=rf"\(status {ending_worker.STATUS}\)") as caught:
        process.receive(time.monotonic() + 60)
    assert type(caught.value) is InvalidMedia
    assert reasons == ["crash"]


@pytest.mark.parametrize("mode", ["LAB", "CMYK", "I;16", "1", "P", "LA"])
def test_tiff_of_any_color_space_is_decoded_as_in_a_thread(mode: str, decoding: Decoding) -> None:
    data = encoded(PIL.Image.new(mode, (64, 64), 100 if mode in ("I;16", "1", "P") else None), "TIFF")
    assert np.array_equal(decoding.load_image(data), load_image(data, REGIME, SETTINGS))
    assert decoding.ended == []


def test_process_that_dies_between_items_fails_none(good: Any, decoding: Decoding) -> None:
    os.kill(decoding.pid, signal.SIGKILL)
    wait_for_end(decoding.pid)
    assert np.array_equal(decoding.load(GOOD), good)
    assert decoding.ended == ["crash"]


def test_process_that_cannot_be_started_fails_one_item(caplog: pytest.LogCaptureFixture) -> None:
    process = DecoderProcess(SETTINGS, lambda _: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(SystemLimitReached, match="limit of its system: Too many open files"):
            process.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caplog.messages == ["a decoding process cannot be started: [Errno 24] Too many open files"]
    process.start()
    process.stop()


def test_program_that_ends_at_its_start_fails_one_item(caplog: pytest.LogCaptureFixture) -> None:
    process = DecoderProcess(SETTINGS, lambda _: None, program="no.such.module")
    with pytest.raises(EngineFailed, match="could not be decoded"):
        process.start()
    assert caplog.messages == [
        "a decoding process cannot be started: it ended with status 1; its messages are in the log"
    ]


def test_process_yields_to_its_parent_and_is_out_of_reach_of_the_terminal(decoding: Decoding) -> None:
    """Linux compares priorities only within a session, unless a container or a service manager sets groups."""
    decoding.load(GOOD)
    assert os.getpriority(os.PRIO_PROCESS, decoding.pid) > os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getsid(decoding.pid) == os.getsid(0)
    assert os.getpgid(decoding.pid) == decoding.pid


def test_process_that_is_stopped_is_replaced_at_the_deadline(good: Any, decoding: Decoding) -> None:
    decoding.limit(Settings(decode_timeout_s=1))
    os.kill(decoding.pid, signal.SIGSTOP)
    with pytest.raises(MediaTooLarge):
        decoding.load(GOOD)
    decoding.limit(SETTINGS)
    assert np.array_equal(decoding.load(GOOD), good)


def test_close_ends_a_process_that_hangs() -> None:
    decoding = Decoding(SETTINGS)
    decoding.process.start()
    failed: list[EmbedderError] = []

    def load() -> None:
        try:
            decoding.load(hanging_clip())
        except EmbedderError as error:
            failed.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(0.2)
    decoding.process.close()
    thread.join(30)
    decoding.process.stop()
    assert [error.code for error in failed] == ["shutting_down"]


@pytest.mark.parametrize(("side", "num_frames"), [(64, 20), (1024, 2), (1024, 20)])
@pytest.mark.parametrize("num_read", [1, 2])
def test_clip_that_is_given_up_while_it_is_decoded_does_not_end_the_process(
    side: int, num_frames: int, num_read: int, good: Any, decoding: Decoding
) -> None:
    """As one whose frames change their size."""
    data = clip(num_frames=20, width=side, height=side)
    decoder = ProcessDecoder(decoding.process, START_BYTES, lambda _: True)
    with decoder.open_clip(data, SETTINGS, time.monotonic() + 60) as opened:
        frames = opened.decode(range(num_frames))
        for _ in range(num_read):
            next(frames)
    assert np.array_equal(decoding.load(GOOD), good)
    assert decoding.ended == []


def test_clip_whose_frames_change_their_size_is_refused_and_does_not_end_the_process(
    good: Any, decoding: Decoding
) -> None:
    with pytest.raises(InvalidMedia, match=r"^video of frames of 64x64, 96x64 pixels; allowed: frames of one size$"):
        decoding.load(clip_of_two_sizes())
    assert np.array_equal(decoding.load(GOOD), good)
    assert decoding.ended == []


def test_small_frames_need_no_larger_limit_than_one_frame(good: Any, decoding: Decoding) -> None:
    decoding.limit(SETTINGS.model_copy(update={"max_image_pixels": 128 * 96}))
    assert np.array_equal(decoding.load(GOOD), good)
    assert decoding.ended == []


def test_memory_of_a_process_does_not_grow_with_clips(decoding: Decoding) -> None:
    """Without a collection of its own, the process would keep 2 MB of each, and be replaced after 35 of them."""

    def address_space() -> int:
        return int(Path(f"/proc/{decoding.pid}/statm").read_text().split()[0]) * 4096

    data = clip(num_frames=30, width=1280, height=720)
    for _ in range(3):
        decoding.load(data, RETRY_BYTES)
    before = address_space()
    for _ in range(6):
        decoding.load(data, RETRY_BYTES)
    assert address_space() < before + 2**22
    assert decoding.ended == []


def test_shared_memory_cannot_be_taken_away() -> None:
    with memory_file(4096) as descriptor:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)


def test_process_has_no_secrets_sockets_or_heavy_libraries(decoding: Decoding) -> None:
    folder = Path(f"/proc/{decoding.pid}")
    names = {entry.split(b"=")[0].decode() for entry in (folder / "environ").read_bytes().split(b"\0") if entry}
    malloc = {"MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert names <= {"OPENBLAS_NUM_THREADS", "LD_LIBRARY_PATH", "LC_CTYPE", *malloc}
    opened = {os.readlink(path).partition(":")[0] for path in (folder / "fd").iterdir()}
    pixels = "/memfd"  # of the frames that both processes map
    assert opened - {pixels} == {"/dev/null", "socket", f"/proc/{decoding.pid}/statm"}
    assert sum(os.readlink(path).startswith("socket") for path in (folder / "fd").iterdir()) == 1
    libraries = (folder / "maps").read_text()
    assert "libavcodec" in libraries
    assert not any(name in libraries for name in ("libtorch", "pydantic", "tokenizers", "uvloop"))
    limits = (folder / "limits").read_text()
    assert "Max core file size        0" in limits
    assert "Max file size             0" in limits


HOSTILE_CODE = """
import ctypes, os, socket, sys, resource, signal, threading
from embedder.inputs import sandbox
parent = os.getppid()
memory = sandbox.open_memory_file()
sandbox.limit_resources()
assert sandbox.refuse_system_calls()
libc = ctypes.CDLL(None, use_errno=True)
attempts = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "create": lambda: os.open("/tmp/x", os.O_CREAT | os.O_WRONLY),
    "stat": lambda: os.stat("/etc/passwd"),
    "list": lambda: os.listdir("/"),
    "socket": lambda: socket.socket(),
    "pair": lambda: socket.socketpair(),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(parent, 0),
    "kill itself": lambda: os.kill(os.getpid(), 0),
    "unlink": lambda: os.unlink("/tmp/x"),
    "memory file": lambda: os.memfd_create("x"),
    "limits of the parent": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE),
    "session": lambda: os.setsid(),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
    "pipe": lambda: os.pipe(),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except PermissionError:
        continue
    except RuntimeError as error:
        assert "thread" in str(error)
        continue
    print(name)
for name, number in {"ptrace": 101, "process_vm_readv": 310, "io_uring_setup": 425, "openat2": 437}.items():
    if libc.syscall(number, parent, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        print(name)
for flags in (0, signal.SIGCHLD, 0x100, 0x4100, 0x20000000, 0x3D0F00 | 0x20000000, 0x3D0F00 & ~0x10000):
    if libc.syscall(56, flags, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        print("clone", flags)
if libc.syscall(435, 0, 0) != -1 or ctypes.get_errno() != 38:
    print("clone3")
thread = threading.Thread(target=lambda: None)  # allowed: the decoder of HEIC needs one
thread.start()
thread.join()
assert sandbox.address_space(memory) > 0
print("done")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are those of x86-64")
def test_sandbox_refuses_files_network_processes_and_signals() -> None:
    run = subprocess.run([sys.executable, "-c", HOSTILE_CODE], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.stderr == ""
    assert run.stdout.split() == ["done"]


# A program without `if __name__ == "__main__"`, which dies while its process hangs.
PROGRAM = """
import os, signal, sys, threading
from embedder.inputs.decoder_process import START_BYTES, DecoderProcess, ProcessDecoder
from embedder.inputs.items import Video
from embedder.inputs.regimes import CheckpointRegime
from embedder.inputs.shared_memory import memory_file
from embedder.inputs.video import load_video
from embedder.settings import Settings
data = open(sys.argv[1], "rb").read()
process = DecoderProcess(Settings(decode_timeout_s=100), print)
process.start()
print(process._process.pid, flush=True)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
load_video(Video(data), CheckpointRegime(), Settings(), decoder=ProcessDecoder(process, START_BYTES, lambda _: True))
"""


def test_process_dies_with_its_parent_even_while_it_hangs(tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(hanging_clip())
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, program, path],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    wait_for_end(int(run.stdout))


def test_pil_image_is_decoded_in_the_thread(decoding: Decoding) -> None:
    image = PIL.Image.new("RGB", (5000, 5000))
    decoder = ProcessDecoder(decoding.process, START_BYTES, lambda _: False)
    assert load_image(image, REGIME, SETTINGS, decoder=decoder).shape[2] == 3
    assert decoding.process._num_items == 0
