"""A response's head is sent with its body, and nothing that was written is lost or late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from embedder.server.joined_writes import MAX_HEAD_BYTES, JoinedWrites

LARGE = bytes(MAX_HEAD_BYTES + 1)


class Sent(asyncio.Transport):
    """Records what is sent, one entry for each system call, and how it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closed
        self.calls.append(bytes(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self.calls.append("end")

    def close(self) -> None:
        self.calls.append("close")
        self.is_closed = True

    def abort(self) -> None:
        self.calls.append("abort")
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


def write(*pieces: bytes) -> Callable[[JoinedWrites], None]:
    def run(transport: JoinedWrites) -> None:
        for piece in pieces:
            transport.write(piece)

    return run


@pytest.mark.parametrize(
    ("turns", "calls"),
    [
        pytest.param([write(b"head", b"body")], [b"headbody"], id="head and body"),
        pytest.param([write(b"head", LARGE)], [b"head" + LARGE], id="large body"),
        pytest.param([write(b"head", b"body", b"head", b"body")], [b"headbody", b"headbody"], id="two responses"),
        pytest.param([write(b"head"), write(b"body")], [b"head", b"body"], id="body in a later turn"),
        pytest.param([write(b"head", b"one", b"two"), write(b"three")], [b"headone", b"two", b"three"], id="pieces"),
        pytest.param([write(LARGE, b"body")], [LARGE, b"body"], id="large head"),
        pytest.param([write(b"head", b"body"), JoinedWrites.close], [b"headbody", "close"], id="closed"),
        pytest.param([lambda one: (one.write(b"head"), one.close())], [b"head", "close"], id="closed in the turn"),
        pytest.param([lambda one: (one.write(b"head"), one.write_eof())], [b"head", "end"], id="ended in the turn"),
        pytest.param([lambda one: (one.write(b"head"), one.abort())], ["abort"], id="aborted"),
        pytest.param([lambda one: (one.write(b"head"), lose(one))], ["abort"], id="lost"),
    ],
)
def test_what_is_written_in_a_turn_is_sent_together(turns: list[Callable[[JoinedWrites], Any]], calls: Any) -> None:
    async def run() -> None:
        joined = JoinedWrites(sent, asyncio.get_running_loop())
        for turn in turns:
            turn(joined)
            await asyncio.sleep(0)

    sent = Sent()
    asyncio.run(run())
    assert sent.calls == calls


def lose(joined: JoinedWrites) -> None:
    """The other side resets the connection."""
    joined._transport.abort()
