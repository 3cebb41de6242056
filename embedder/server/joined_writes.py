"""Sends a response's head together with its body.

uvicorn writes them one after the other, and uvloop sends each write at once. Together they are one system call and one
packet, and the client wakes up once.
"""

from __future__ import annotations

import asyncio

MAX_HEAD_BYTES = 2**12  # more is sent at once


class JoinedWrites(asyncio.Transport):
    """A transport that holds a small write until the next one, or until the end of this turn of the event loop.

    It has what uvicorn's protocol uses to write and to close. Reading is controlled through the transport itself.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = b""
        self.is_closing = transport.is_closing  # type: ignore[method-assign]  # half the time of a method
        self.get_extra_info = transport.get_extra_info  # type: ignore[method-assign]

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.writelines((held, data))
        elif len(data) > MAX_HEAD_BYTES:
            self._transport.write(data)
        else:
            self._held = bytes(data)
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._held = b""
        self._transport.abort()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self.is_closing():
            self._transport.write(held)
