"""Memory that this process and a decoding process map: files on their way there, and pixels on their way back."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

RGB_BYTES_PER_PIXEL = 3  # of the pixels in memory that both processes map
BUFFER_BYTES = 2**22  # of several small frames, so that a clip does not wake the parent for each of them
KEPT_BYTES = 2**23  # of a buffer that is kept for the next item: a frame of 1080p fits


@contextmanager
def memory_file(num_bytes: int) -> Iterator[int]:
    """A descriptor of memory that both processes can map, and neither can make smaller or larger."""
    descriptor = os.memfd_create("decoding", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        yield descriptor
    finally:
        os.close(descriptor)


def kept_buffers(buffers: dict[int, mmap.mmap]) -> dict[int, mmap.mmap]:
    """Those that both processes keep for the next item: new memory costs it a page fault for every 4 KiB."""
    return {number: buffer for number, buffer in buffers.items() if len(buffer) <= KEPT_BYTES}
