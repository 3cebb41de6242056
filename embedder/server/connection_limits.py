"""How long a connection may stay in each state, how many connections there may be, and whose bytes are parsed when.

One sweep over all connections, twice a second, replaces a timer for each state: it asks a connection which state it is
in, so no sequence of bytes can lead to a state that nothing ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from collections import deque
from enum import Enum, auto
from typing import Protocol

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # load balancers and pooled clients mostly keep idle connections for 60 s
LINGER_S = 2.0  # for bytes that nobody will read, after a response
SWEEP_S = 0.5
MAX_CONNECTIONS = 10_000  # of a worker, if the limit on open files allows more
MAX_HELD_BYTES = 2**26  # of all connections together: received ahead of a response, and not parsed yet
COSTLY_SHARE = 0.2  # of the event loop's time: for all bodies in tiny chunks together
LOG_EVERY_S = 10.0


class State(Enum):
    """What a connection waits for."""

    HEAD = auto()  # for the first request, or for the rest of a head
    IDLE = auto()  # for another request
    BODY = auto()  # for the rest of a body that the app reads
    RESPONSE = auto()  # for the app, which has deadlines of its own
    UNREAD = auto()  # for the caller to read a response
    REST = auto()  # for the rest of a body that was answered already
    REFUSED = auto()  # for the caller to read an error and close
    CLOSING = auto()  # for the caller to read what was sent before the end


class Connection(Protocol):
    """What the limits need to know of a connection, and do to it."""

    since: tuple[tuple[State, int], float]

    def state(self) -> State:
        """The state now."""

    @property
    def epoch(self) -> int:
        """A number that changes with each progress that starts the time of a state again."""

    def end(self, state: State) -> None:
        """Close the connection, which was in this state too long."""

    def refuse_for_lack_of_connections(self, *, lingers: bool) -> None:
        """Send an error and close the connection."""

    def take_turn(self) -> float:
        """Parse for about a millisecond. Returns about how many seconds the request takes that was read to its end."""


class ConnectionLimits:
    """The connections of one worker. `max_wait_s`: for a head to arrive, and for a response to be read."""

    def __init__(self, max_wait_s: float, max_connections: int | None = None) -> None:
        self.max_connections = max_connections or _connections_within_open_files()
        self.held_bytes = 0
        self.turns = Turns()
        self._max_s = {
            State.HEAD: max_wait_s,
            State.IDLE: KEEP_ALIVE_S,
            State.BODY: 2 * max_wait_s + LINGER_S,  # the app's own deadline comes first
            State.RESPONSE: float("inf"),
            State.UNREAD: max_wait_s,
            State.REST: LINGER_S,
            State.REFUSED: LINGER_S,
            State.CLOSING: max_wait_s,
        }
        self._connections: dict[Connection, None] = {}
        self._idle: deque[Connection] = deque()  # at the last sweep; the one to close first comes first
        self._timer: asyncio.TimerHandle | None = None
        self._logged_s = float("-inf")

    def admit(self, connection: Connection) -> None:
        """Count a new connection. If there are too many, the longest idle one is closed, or else the new one."""
        self._connections[connection] = None
        now_s = time.monotonic()
        connection.since = (connection.state(), connection.epoch), now_s
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        excess = len(self._connections) - self.max_connections
        if excess > 0:
            self._log_excess(now_s)
            if not self._close_an_idle_one():
                connection.refuse_for_lack_of_connections(lingers=excess < self.max_connections / 8)

    def forget(self, connection: Connection) -> None:
        """Remove a connection that is closed."""
        self._connections.pop(connection, None)

    def _sweep(self) -> None:
        now_s = time.monotonic()
        idle: list[tuple[bool, float, int, Connection]] = []
        for index, connection in enumerate(tuple(self._connections)):
            now = connection.state(), connection.epoch
            then, since_s = connection.since
            if now != then:
                connection.since = now, now_s
            elif now_s - since_s >= self._max_s[now[0]]:
                connection.end(now[0])
            elif now[0] is State.IDLE or (now[0] is State.HEAD and now_s - since_s > LINGER_S):
                idle.append((now[0] is State.IDLE, since_s, index, connection))
        self._idle = deque(connection for *_, connection in sorted(idle))
        is_any_left = bool(self._connections)
        self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep) if is_any_left else None

    def _close_an_idle_one(self) -> bool:
        while self._idle:
            connection = self._idle.popleft()
            state = connection.state()
            if connection in self._connections and state in (State.IDLE, State.HEAD):
                connection.end(state)
                return True
        return False

    def _log_excess(self, now_s: float) -> None:
        if now_s - self._logged_s > LOG_EVERY_S:
            self._logged_s = now_s
            logger.warning(
                "%d connections are open, the most that the limit on open files (ulimit -n: %s) and %d allow: the "
                "longest idle are closed, and new ones refused with 429 if none is idle",
                self.max_connections,
                resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                MAX_CONNECTIONS,
            )


def _connections_within_open_files() -> int:
    """How many connections leave a quarter of the allowed open files, at most 128, for everything else."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    num_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    return max(8, min(MAX_CONNECTIONS, allowed - num_open - min(128, allowed // 4)))


class Turns:
    """Parses for connections whose bytes are costly, each in turn, for `COSTLY_SHARE` of the time at most.

    A body in chunks of one byte costs many times as much per byte as any other. All such bodies wait for each other
    here, and every other request waits for one turn at most.
    """

    def __init__(self) -> None:
        self._waiting: deque[Connection] = deque()
        self._is_running = False

    def wait(self, connection: Connection) -> None:
        """Call `connection.take_turn` when its turn comes."""
        self._waiting.append(connection)
        if not self._is_running:
            self._is_running = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        begin_s = time.perf_counter()
        request_s = self._waiting.popleft().take_turn()
        spent_s = time.perf_counter() - begin_s + request_s
        self._is_running = bool(self._waiting)
        if self._is_running:
            pause_s = spent_s * (1 / COSTLY_SHARE - 1)
            asyncio.get_running_loop().call_later(max(pause_s, 0.001), self._run)  # the loop counts milliseconds
