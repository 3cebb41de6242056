"""The decoding process: opens and decodes the images and clips that arrive at its socket, one item at a time.

`decoder_process` starts it and speaks with it. It imports neither torch nor the settings, and it is untrusted from its
first task on: a fault in a decoder may let a caller's bytes take it over. Each message is one JSON object, with at most
one file descriptor of memory that the parent has allocated. The dialogue about one item:

    parent: open, with the encoded bytes       process: opened, with sizes
    parent: decode, with indices of frames     process: frames, some at a time, in one of two buffers
    parent: free, when it has read a buffer and waits for another one
    process: buffer, when it needs one         parent: buffer, with the memory
    process: memory, when it needs more        parent: memory, with the new limit
    parent: end, also while frames follow      process: ended

An error ends the item in place of any answer: `error` with the name of its class.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import mmap
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from embedder.errors import EmbedderError
from embedder.inputs import sandbox
from embedder.inputs.clip import OpenClip, open_clip
from embedder.inputs.formats import IMAGE_FORMATS
from embedder.inputs.limits import FixedLimits, TooLittleMemory
from embedder.inputs.picture import decode_image, decode_peak_bytes, open_image
from embedder.inputs.process_connection import Connection, Ended, confine
from embedder.inputs.shared_memory import BUFFER_BYTES, RGB_BYTES_PER_PIXEL, kept_buffers

NUM_BUFFERS = 2  # one is filled while the parent reads the other
WORN_BYTES = 2**26  # of address space that items have left behind; then the parent replaces the process
OWN_BYTES = WORN_BYTES + 2**25  # of memory for the interpreter's own needs, in addition to what decoding may use
PARENT_BYTES_PER_PIXEL = 4  # of a decoded image, in Pillow's form
STRIP_BYTES = 2**20  # of an image that is copied to a buffer


class _Refused(Exception):
    """The parent does not grant the memory now."""


class _End(Exception):
    """The parent needs no more of the item."""


class _Item:
    """One item: what is open, and the memory that it may use. `buffers`: those left by earlier items."""

    def __init__(
        self, connection: Connection, limits: FixedLimits, address_space: int, buffers: dict[int, mmap.mmap]
    ) -> None:
        self._connection = connection
        self._limits = limits
        self._address_space = address_space  # of the process without an item
        self._memory = 0
        self._deadline = 0.0
        self._opened: list[tuple[OpenClip | PIL.Image.Image, int]] = []  # each with the memory to decode it
        self._buffers = buffers
        self._num_unread = 0  # buffers that the parent has not read
        self._number = -1
        self._num_encoded_bytes = 0
        self.has_clip = False

    def serve(self) -> NoReturn:
        """Answer the messages of one item. Raises its error, or `_End`."""
        message, descriptor = self._receive()
        self._deadline = message["deadline"]
        self._number = message["item"]
        self._limit_memory(message["memory"])
        with contextlib.ExitStack() as stack:
            while True:
                if message["type"] == "open":
                    assert descriptor is not None
                    data = _read(descriptor, message["num_bytes"])
                    self._open(message["kind"], data, stack)
                else:
                    self._decode(message["opened"], message["indices"])
                message, descriptor = self._receive()

    def _receive(self) -> tuple[dict[str, Any], int | None]:
        """The next message that is not `free`. Raises `_End`."""
        while True:
            message, descriptor = self._receive_one()
            if message["type"] not in ("free", "end"):
                return message, descriptor

    def _receive_one(self) -> tuple[dict[str, Any], int | None]:
        """The next message. `free` and `end` of an earlier item, which ended with an error, do not count."""
        message, descriptor = self._connection.receive()
        if message["item"] == self._number:
            self._num_unread -= message["type"] == "free"
            if message["type"] == "end":
                raise _End
        return message, descriptor

    def _open(self, kind: str, data: bytes, stack: contextlib.ExitStack) -> None:
        self._num_encoded_bytes += 2 * len(data)  # the decoders copy them
        if kind == "clip":
            self.has_clip = True
            clip = stack.enter_context(open_clip(data, self._limits, self._deadline))
            buffers = NUM_BUFFERS * RGB_BYTES_PER_PIXEL * clip.width * clip.height
            self._opened.append((clip, clip.num_bytes + buffers))
            sizes = {"width": clip.width, "height": clip.height, "num_frames": clip.num_frames, "fps": clip.fps}
        else:
            image = open_image(data, self._limits, self._deadline)
            buffers = (RGB_BYTES_PER_PIXEL + PARENT_BYTES_PER_PIXEL) * image.width * image.height
            num_bytes = decode_peak_bytes(image, data) + buffers
            self._opened.append((image, num_bytes))
            sizes = {"width": image.width, "height": image.height}
        self._connection.send(type="opened", **sizes)

    def _decode(self, number: int, indices: list[int]) -> None:
        opened, num_bytes = self._opened[number]
        self._num_unread = 0  # the parent has read what it asked for before
        self._require(num_bytes)
        if isinstance(opened, OpenClip):
            self._send_frames(opened.decode(indices), len(indices))
            return
        rgb = decode_image(opened, is_raw=self._limits.raw_orientation)
        self._opened[number] = (PIL.Image.new("RGB", (1, 1)), 0)  # it is decoded once; this frees its pixels
        del opened
        (target,) = self._frames_of_buffer(0, rgb.height, rgb.width, 1)
        _copy_strips(rgb, target)
        self._send_buffer(0, target[None])

    def _send_frames(self, frames: Iterator[NDArray[np.uint8]], num_frames: int) -> None:
        number = num_filled = num_sent = 0
        target = np.empty((0, 0, 0, RGB_BYTES_PER_PIXEL), np.uint8)
        for values in frames:
            if num_filled == len(target) or values.shape != target.shape[1:]:
                if num_filled:
                    self._send_buffer(number, target[:num_filled])
                    number, num_sent, num_filled = (number + 1) % NUM_BUFFERS, num_sent + num_filled, 0
                target = self._frames_of_buffer(number, values.shape[0], values.shape[1], num_frames - num_sent)
            target[num_filled] = values
            num_filled += 1
        if num_filled:
            self._send_buffer(number, target[:num_filled])

    def _frames_of_buffer(self, number: int, height: int, width: int, num_frames: int) -> NDArray[np.uint8]:
        """A buffer that the parent has read, as an array of frames: of one, or of up to `num_frames` small ones."""
        while self._num_unread >= NUM_BUFFERS:
            self._receive_one()
        frame_bytes = RGB_BYTES_PER_PIXEL * height * width
        num_frames = max(1, min(num_frames, BUFFER_BYTES // frame_bytes))
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < num_frames * frame_bytes:
            self._connection.send(type="buffer", buffer=number, num_bytes=num_frames * frame_bytes)
            _, descriptor = self._receive()
            assert descriptor is not None
            buffer = self._buffers[number] = mmap.mmap(descriptor, num_frames * frame_bytes)
            os.close(descriptor)
        values = np.frombuffer(buffer, np.uint8, num_frames * frame_bytes)
        return values.reshape(num_frames, height, width, RGB_BYTES_PER_PIXEL)

    def _send_buffer(self, number: int, frames: NDArray[np.uint8]) -> None:
        num_frames, height, width, _ = frames.shape
        self._connection.send(type="frames", buffer=number, num_frames=num_frames, height=height, width=width)
        self._num_unread += 1

    def _require(self, num_bytes: int) -> None:
        """Ask for memory, if the item may not use that much yet."""
        num_bytes += self._num_encoded_bytes
        if num_bytes > self._memory:
            self._connection.send(type="memory", num_bytes=num_bytes)
            message, _ = self._receive()
            if not message["is_granted"]:
                raise _Refused
            self._limit_memory(num_bytes)

    def _limit_memory(self, num_bytes: int) -> None:
        self._memory = num_bytes
        sandbox.limit_task(self._address_space + num_bytes, self._limits.decode_timeout_s)


def main(descriptor: int, parent: int, limits: dict[str, Any]) -> None:
    """Serve items until the socket `descriptor` is closed. `parent`: process id. `limits`: fields of FixedLimits."""
    process = confine(descriptor, parent, _import_everything)
    worn_address_space = process.address_space + WORN_BYTES
    buffers: dict[int, mmap.mmap] = {}
    gc.freeze()  # so that a collection looks only at an item's objects
    with contextlib.suppress(Ended):
        while True:
            item = _Item(process.connection, FixedLimits(**limits), process.address_space + OWN_BYTES, buffers)
            answer, has_clip = _serve(item), item.has_clip
            del item
            if has_clip:
                gc.collect()  # PyAV's objects refer to each other: a clip of 720p would leave 2 MB
            buffers = kept_buffers(buffers)
            if sandbox.address_space(process.memory_file) > worn_address_space:
                _return_free_memory()
            is_worn = sandbox.address_space(process.memory_file) > worn_address_space
            process.connection.send(**answer, is_worn=is_worn)


def _serve(item: _Item) -> dict[str, str]:
    """Serve one item. Returns the last answer."""
    try:
        item.serve()
    except _End:
        return {"type": "ended"}
    except (TooLittleMemory, MemoryError):
        return {"type": "error", "error": "TooLittleMemory", "message": ""}
    except _Refused:
        return {"type": "error", "error": "Refused", "message": ""}
    except EmbedderError as error:
        return {"type": "error", "error": type(error).__name__, "message": error.message[:1000]}


def _read(descriptor: int, num_bytes: int) -> bytes:
    """The bytes of a file from its start. Closes it."""
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        return os.pread(file.fileno(), num_bytes, 0)


def _copy_strips(image: PIL.Image.Image, target: NDArray[np.uint8]) -> None:
    """Copy an image's rows, some at a time: an array of the whole image would be one more copy."""
    num_rows = max(1, STRIP_BYTES // (RGB_BYTES_PER_PIXEL * image.width))
    for row in range(0, image.height, num_rows):
        end = min(row + num_rows, image.height)
        strip = image if num_rows >= image.height else image.crop((0, row, image.width, end))
        target[row:end] = np.asarray(strip)


def _return_free_memory() -> None:
    """Return freed memory to the system, so that the next item has its address space."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc only
        trim(0)


def _import_everything() -> None:
    """Decode one small file of every kind: what libraries import or load when first used needs files."""
    import PIL.ImageCms  # converts TIFF files in the color space LAB
    import PIL.MpoImagePlugin
    import PIL.TiffImagePlugin  # reads EXIF

    limits = FixedLimits(2**20, 2**20, 2**20, 60.0, False)
    deadline = float("inf")
    fast: dict[str, dict[str, Any]] = {"AVIF": {"speed": 10, "max_threads": 1}, "TIFF": {"compression": "tiff_lzw"}}
    for kind in (one.pillow for one in IMAGE_FORMATS if one.name != "HEIC"):  # its library writes none, and is loaded
        file = io.BytesIO()
        PIL.Image.new("RGB", (16, 16)).save(file, kind, **fast.get(kind, {}))
        image = decode_image(open_image(file.getvalue(), limits, deadline))
        _copy_strips(image, np.empty((16, 16, RGB_BYTES_PER_PIXEL), np.uint8))
        if kind == "GIF":
            with open_clip(file.getvalue(), limits, deadline) as clip:
                list(clip.decode([0]))
    with contextlib.suppress(EmbedderError):
        open_image(b"\x89PNG\r\n\x1a\n", limits, deadline)
