"""A process for untrusted bytes: its start, and its socket.

A message is one JSON object, with at most one file descriptor.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from embedder.inputs import sandbox

MAX_MESSAGE = 2**16


class Ended(Exception):
    """The parent has no more tasks, or is gone."""


class Connection:
    """The socket to the parent."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, **message: Any) -> None:
        """Send a message. Raises `Ended`."""
        try:
            self._socket.send(orjson.dumps(message))
        except OSError as error:
            raise Ended from error

    def receive(self) -> tuple[dict[str, Any], int | None]:
        """The next message, and its file descriptor. Raises `Ended`."""
        data, descriptors, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 1)
        if not data:
            raise Ended
        return orjson.loads(data), descriptors[0] if descriptors else None


@dataclass(frozen=True)
class Confined:
    """What `confine` has set up. `address_space`: bytes that this process uses without a task."""

    connection: Connection
    address_space: int
    memory_file: int  # of `sandbox.address_space`


def confine(descriptor: int, parent: int, import_everything: Callable[[], None]) -> Confined:
    """Confine this process, and tell the parent that it is ready.

    `descriptor`: the socket's. `parent`: process id. `import_everything` uses whatever needs files when first used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    sandbox.die_with_parent(parent)
    sandbox.be_killed_first()
    os.nice(5)  # on a busy machine, what is decoded can wait; the event loop and a batch cannot
    import_everything()
    connection = Connection(socket.socket(fileno=descriptor))
    with open("/dev/null", "wb") as nothing:
        os.dup2(nothing.fileno(), 2)  # a library's message could hold what callers sent
    sandbox.limit_resources()
    memory_file = sandbox.open_memory_file()
    address_space = sandbox.address_space(memory_file)
    connection.send(type="ready", is_confined=sandbox.refuse_system_calls())
    return Confined(connection, address_space, memory_file)
