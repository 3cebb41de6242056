"""Decodes images and clips in a separate process, which is killed when an item takes too long and then replaced.

A single call of a decoder can take any time, and a thread cannot be stopped. The process has limits on memory and CPU
time, and can do nothing but compute (`sandbox`); `decoder_worker` describes the dialogue. Pixels arrive in memory that
both processes map. This process allocates it, sealed, so that the other one cannot take it away.

The process is a new program, not a fork of this one, so it has none of its threads, sockets, secrets and libraries. It
can be started in a service, in a program without `if __name__ == "__main__"`, and in an actor of Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import PIL.Image
from numpy.typing import NDArray

from embedder.errors import EmbedderError, EngineFailed, InvalidMedia, MediaTooLarge, ShuttingDown, system_limit
from embedder.inputs.decoder import NeedsProcess, OpenImage, ProcessKilled, ThreadDecoder
from embedder.inputs.limits import FixedLimits, MediaLimits, decoding_took_too_long
from embedder.inputs.process_connection import MAX_MESSAGE
from embedder.inputs.shared_memory import BUFFER_BYTES, RGB_BYTES_PER_PIXEL, kept_buffers, memory_file
from embedder.settings import decoder_environment

logger = logging.getLogger(__name__)

# Memory of an item: a clip of 1080p fits. Items that need more wait until it is free.
START_BYTES = 192 * 2**20
RETRY_BYTES = 2**29  # for an item whose need is unknown, and more than that at the start
START_TIMEOUT_S = 60.0
GRACE_S = 0.25  # after the deadline, in which the process may end the item by itself
MAX_UNREAD = 3  # messages that the process sends without an answer: frames in two buffers, and a request for another

EndReason = Literal["deadline", "memory", "crash"]

_PROGRAM = (
    "import importlib, json, sys; sys.path[:], module, descriptor, parent, limits = json.loads(sys.argv[1]); "
    "importlib.import_module(module).main(descriptor, parent, limits)"
)


def can_start_processes() -> bool:
    """Whether the platform has what a decoding process needs; Linux has."""
    return hasattr(os, "memfd_create")


class DecoderProcess:
    """One decoding process, started when it is first needed and replaced after it was killed.

    Only one thread may use it, which calls `stop` at its end: the process ends with the thread that has started it.
    `close` may be called by any thread. `on_end` is called with the reason when the process was killed or has died.
    `program`: the module whose `main` runs in the process.
    """

    def __init__(
        self,
        limits: MediaLimits,
        on_end: Callable[[EndReason], None],
        program: str = "embedder.inputs.decoder_worker",
    ) -> None:
        self.limits = FixedLimits.of(limits)
        self.buffers: dict[int, mmap.mmap] = {}  # of pixels, which both processes map
        self._program = program
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._is_closed = False
        self._num_items = 0

    def next_item(self) -> int:
        """A number for the next item."""
        self._num_items += 1
        return self._num_items

    def start(self) -> None:
        """Start the process, unless it runs. Raises `SystemLimitReached` and `EngineFailed`."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            self.replace("crash", f"it ended with status {self._process.returncode} between two items")
        if self._is_closed:
            raise ShuttingDown("the service is shutting down")
        try:
            self._spawn()
            ready = self._receive(time.monotonic() + START_TIMEOUT_S)
            if ready is None:
                raise ChildProcessError(f"it ended with status {self.stop()}; its messages are in the log")
        except OSError as error:
            self.stop()
            if self._is_closed:
                raise ShuttingDown("the service is shutting down") from error
            logger.error("a decoding process cannot be started: %s", error)
            raise system_limit(error) or EngineFailed("the item could not be decoded; see the service's log") from error
        if not ready["is_confined"]:
            logger.warning("a decoding process runs without a system-call filter, because this platform has none")

    def _spawn(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            paths = [os.path.abspath(path) for path in (*sys.path, str(Path(__file__).parents[2])) if path]
            arguments = json.dumps([paths, self._program, theirs.fileno(), os.getpid(), asdict(self.limits)])
            self._process = subprocess.Popen(  # noqa: S603 - the arguments are ours
                [sys.executable, "-I", "-S", "-c", _PROGRAM, arguments],
                env=decoder_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is not for it. In a session of its own, `nice` would have no effect
            )

    def send(self, descriptor: int | None = None, **message: Any) -> None:
        """Send a message, with a file descriptor. A process that has ended is noticed when it does not answer."""
        assert self._socket is not None
        with contextlib.suppress(OSError):
            socket.send_fds(self._socket, [orjson.dumps(message)], [] if descriptor is None else [descriptor])

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message. Kills a late process. Raises `InvalidMedia`, `MediaTooLarge` and `ProcessKilled`."""
        message = self._receive(deadline + GRACE_S)
        if message is not None:
            return message
        if self._is_closed:
            raise ShuttingDown("the service is shutting down")
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that ends by itself has closed its socket before
            self._process.wait(max(0.0, deadline - time.monotonic()))
        is_late = time.monotonic() >= deadline
        status = self.stop()
        if is_late or status == -signal.SIGXCPU:
            self._report("deadline", "it did not finish an item in time")
            raise decoding_took_too_long(self.limits)
        self._report("crash", f"it ended with status {status}")
        kind = ProcessKilled if status == -signal.SIGKILL else InvalidMedia
        raise kind(f"the decoder failed on this file (status {status}); it is damaged, or the machine is out of memory")

    def replace(self, reason: EndReason, what: str) -> None:
        """End the process; the next item starts another one."""
        self.stop()
        self._report(reason, what)

    def close(self) -> None:
        """Kill the process, also while another thread waits for it."""
        self._is_closed = True
        if self._process is not None:
            self._process.kill()

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message; None if the process has ended, or does not answer by the deadline."""
        assert self._socket is not None
        try:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            message = orjson.loads(self._socket.recv(MAX_MESSAGE) or b"null")
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def stop(self) -> int | None:
        """Kill the process and wait for its end. Returns its status; None if there is none."""
        status = None
        if self._process is not None:
            self._process.kill()
            status = self._process.wait()
            self._process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self.buffers = {}
        return status

    def _report(self, reason: EndReason, what: str) -> None:
        logger.warning("a decoding process is replaced: %s", what)
        self._on_end(reason)


class ProcessDecoder(ThreadDecoder):
    """Decodes one item: simple images in the calling thread, everything else in a process. Close it afterwards.

    `num_bytes`: memory that the item may use. `grow(num_bytes)` asks for more; if it returns False, the item raises
    `NeedsProcess` with the memory that it needs.
    """

    def __init__(self, process: DecoderProcess, num_bytes: int, grow: Callable[[int], bool]) -> None:
        self.process = process
        self.deadline = 0.0
        self._num_bytes = num_bytes
        self._grow = grow
        self._num_opened = 0
        self._number = 0  # of the dialogue
        self._refused = 0  # bytes of memory

    def open_large_image(self, data: bytes, num_bytes: int, limits: MediaLimits, deadline: float) -> OpenImage:
        opened = self._open("image", data, deadline)
        return ProcessImage(self, self._num_opened - 1, **self._sizes(opened))

    @contextmanager
    def open_clip(self, data: bytes, limits: MediaLimits, deadline: float) -> Iterator[ProcessClip]:
        self.close()
        try:
            opened = self._open("clip", data, deadline)
            num_frames, fps = opened.get("num_frames"), opened.get("fps")
            if not isinstance(num_frames, int) or not isinstance(fps, float | int) or not num_frames > 0 < fps:
                raise self._wrong_answer()
            yield ProcessClip(self, self._num_opened - 1, **self._sizes(opened), num_frames=num_frames, fps=fps)
        finally:
            self.close()

    def decode(self, number: int, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames of what was opened as `number`, each valid until the next one."""
        self.process.send(type="decode", item=self._number, opened=number, indices=list(indices))
        num_missing = len(indices)
        while num_missing:
            frames = self._pixels(self._answer("frames"), num_missing)
            num_missing -= len(frames)
            yield from frames
            if num_missing:
                self.process.send(type="free", item=self._number)

    def close(self) -> None:
        """End the dialogue, also in the middle of a clip, so that the process is free for another item."""
        if not self._num_opened:
            return
        self.process.send(type="end", item=self._number)
        with contextlib.suppress(EmbedderError):  # then the process was replaced; the item has its result
            if not any(self._receive().get("type") in ("ended", "error") for _ in range(MAX_UNREAD + 1)):
                raise self._wrong_answer()
        self._end()

    def _open(self, kind: str, data: bytes, deadline: float) -> dict[str, Any]:
        if not self._num_opened:
            begin = time.monotonic()
            self.process.start()
            self._number = self.process.next_item()
            self.deadline = max(deadline + time.monotonic() - begin, self.deadline)
        self._num_opened += 1
        with memory_file(len(data)) as descriptor:
            os.pwrite(descriptor, data, 0)
            self.process.send(
                descriptor,
                type="open",
                item=self._number,
                kind=kind,
                num_bytes=len(data),
                memory=self._num_bytes,
                deadline=self.deadline,
            )
        return self._answer("opened")

    def _answer(self, expected: str) -> dict[str, Any]:
        """The message of this type. Answers requests for memory, and raises the item's error."""
        while True:
            message = self._receive()
            match message.get("type"):
                case "memory":
                    self._grant_memory(message)
                case "buffer":
                    self._share_buffer(message)
                case "error":
                    self._fail(message)
                case found if found == expected:
                    return message
                case _:
                    raise self._wrong_answer()

    def _receive(self) -> dict[str, Any]:
        try:
            message = self.process.receive(self.deadline)
        except (MediaTooLarge, InvalidMedia, ShuttingDown):
            self._end()
            raise
        if message.get("is_worn"):
            self.process.replace("memory", "items have left too much memory behind")
        return message

    def _grant_memory(self, message: dict[str, Any]) -> None:
        num_bytes = self._integer(message, "num_bytes", 2**50)
        is_granted = self._grow(num_bytes)
        self._refused = 0 if is_granted else num_bytes
        if is_granted:
            self._num_bytes = num_bytes
        self.process.send(type="memory", item=self._number, is_granted=is_granted)

    def _share_buffer(self, message: dict[str, Any]) -> None:
        number = self._integer(message, "buffer", 1)
        frame_bytes = RGB_BYTES_PER_PIXEL * self.process.limits.max_image_pixels
        num_bytes = self._integer(message, "num_bytes", max(BUFFER_BYTES, frame_bytes))
        with memory_file(num_bytes) as descriptor:
            self.process.buffers[number] = mmap.mmap(descriptor, num_bytes)
            self.process.send(descriptor, type="buffer", item=self._number)

    def _pixels(self, message: dict[str, Any], max_frames: int) -> NDArray[np.uint8]:
        """The frames in a buffer -> (num_frames, height, width, 3)."""
        buffer = self.process.buffers.get(self._integer(message, "buffer", 1), b"")
        height, width = (self._integer(message, side, 2**20) for side in ("height", "width"))
        num_frames = self._integer(message, "num_frames", max_frames)
        num_bytes = RGB_BYTES_PER_PIXEL * num_frames * height * width
        if not 0 < num_bytes <= len(buffer):
            raise self._wrong_answer()
        return np.frombuffer(buffer, np.uint8, num_bytes).reshape(num_frames, height, width, RGB_BYTES_PER_PIXEL)

    def _sizes(self, opened: dict[str, Any]) -> dict[str, int]:
        sizes = {side: self._integer(opened, side, 2**20) for side in ("width", "height")}
        if not 0 < sizes["width"] * sizes["height"] <= self.process.limits.max_image_pixels:
            raise self._wrong_answer()
        return sizes

    def _integer(self, message: dict[str, Any], name: str, maximum: int) -> int:
        value = message.get(name)
        if not isinstance(value, int) or not 0 <= value <= maximum:
            raise self._wrong_answer()
        return value

    def _wrong_answer(self) -> InvalidMedia:
        """The error after an answer that the program of the process cannot give: a caller's bytes have changed it."""
        self.process.replace("crash", "it gave an impossible answer")
        self._end()
        return InvalidMedia("the decoder failed on this file; it is damaged")

    def _fail(self, message: dict[str, Any]) -> None:
        """Raise the error that the process reports."""
        self._end()
        kind, text = message.get("error"), str(message.get("message"))[:1000]
        if kind == "Refused":
            raise NeedsProcess(self._refused)
        if kind == "MediaTooLarge":
            raise MediaTooLarge(text)
        if kind != "TooLittleMemory":
            raise InvalidMedia(text)
        if self._num_bytes < RETRY_BYTES:
            raise NeedsProcess(RETRY_BYTES)
        raise MediaTooLarge(
            f"decoding takes more than {self._num_bytes // 2**20} MiB of memory; allowed: what a file of this kind and "
            "size usually takes. It may be damaged"
        )

    def _end(self) -> None:
        self._num_opened = 0
        self.process.buffers = kept_buffers(self.process.buffers)


@contextmanager
def decoder_for_one_item(limits: MediaLimits) -> Iterator[ProcessDecoder]:
    """A decoder with a process of its own, which starts if it is needed. For headers: it has little memory."""
    process = DecoderProcess(limits, lambda _: None)
    decoder = ProcessDecoder(process, RETRY_BYTES, lambda _: False)
    try:
        yield decoder
    finally:
        decoder.close()
        process.stop()


@dataclass(frozen=True)
class ProcessImage:
    """An image that a process decodes."""

    decoder: ProcessDecoder
    number: int
    width: int
    height: int

    def decode(self) -> PIL.Image.Image:
        (image,) = [
            PIL.Image.frombuffer("RGB", (values.shape[1], values.shape[0]), values, "raw", "RGB", 0, 1)
            for values in self.decoder.decode(self.number, [0])
        ]
        return image


@dataclass(frozen=True)
class ProcessClip:
    """A video that a process decodes."""

    decoder: ProcessDecoder
    number: int
    width: int
    height: int
    num_frames: int
    fps: float

    def decode(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Decode frames; see `OpenClip`."""
        return self.decoder.decode(self.number, indices)
