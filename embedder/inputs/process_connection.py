"""The socket of a process for untrusted bytes: one JSON object a message, with at most one file descriptor."""

from __future__ import annotations

import json
import socket
from typing import Any

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
            self._socket.send(json.dumps(message).encode())
        except OSError as error:
            raise Ended from error

    def receive(self) -> tuple[dict[str, Any], int | None]:
        """The next message, and its file descriptor. Raises `Ended`."""
        data, descriptors, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 1)
        if not data:
            raise Ended
        return json.loads(data), descriptors[0] if descriptors else None
