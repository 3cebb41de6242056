"""How the service starts and stops, around BentoML's arbiter (the parent process) and its workers.

A start that fails ends the whole service with status 1: BentoML itself would start the worker again every 10 s, for
ever, while callers hang in the socket. At SIGTERM a worker answers what it has taken before its server is told to stop;
BentoML's server closes connections at once, also those on which a request is just arriving (BentoML 1.4.39).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, MethodType
from typing import NoReturn

import click
import uvicorn
from bentoml._internal.configuration.containers import BentoMLContainer  # what `bentoml serve` itself asks
from circus.client import make_json
from circus.sighandler import SysHandler

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_LOOK_S = 1.0
_LEFT_S = 5  # for answers that are on their way when the drain is over


def own_server() -> uvicorn.Server:
    """The server of this worker, while it starts: it listens for SIGTERM already, and for callers not yet."""
    handler = signal.getsignal(signal.SIGTERM)
    assert isinstance(handler, MethodType)
    server = handler.__self__
    assert isinstance(server, uvicorn.Server)
    return server


class Drain:
    """The requests that a worker has taken, and whether it takes more."""

    def __init__(self) -> None:
        self.is_draining = False
        self._num_requests = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request."""
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    def begin_at_sigterm(self, server: uvicorn.Server, max_s: float) -> None:
        """In the worker's event loop: from now on SIGTERM reaches its server when no request is left.

        Or after `max_s`: who does not read an answer must not hold the worker until it is killed.
        """
        loop = asyncio.get_running_loop()
        server.config.timeout_graceful_shutdown = _LEFT_S  # without it the server itself waits for ever

        def drain(signum: int, until_s: float) -> None:
            if self._num_requests and loop.time() < until_s:
                loop.call_later(_POLL_S, drain, signum, until_s)
            else:
                server.handle_exit(signum, None)

        def begin(signum: int, _: FrameType | None) -> None:
            self.is_draining = True
            loop.call_soon_threadsafe(drain, signum, loop.time() + max_s)

        signal.signal(signal.SIGTERM, begin)


def end_with_arbiter(arbiter: int) -> None:
    """In the worker's event loop: SIGTERM to itself once that parent is gone; else it held port and GPU for ever."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        if os.getppid() == arbiter:
            loop.call_later(_LOOK_S, look)
        else:
            signal.raise_signal(signal.SIGTERM)

    look()


def stop_when_told() -> None:
    """In the arbiter, before it is there: it stops at SIGTERM also where that meets it while it starts a worker.

    circus (kantoku 0.18) takes one command at a time, and drops another; so it is asked until it does stop.
    """

    def quit_until_heard(handler: SysHandler) -> None:
        controller = handler.controller

        def ask() -> None:
            if not controller.arbiter._stopping:  # has no public name
                controller.dispatch((None, make_json("quit")))
                controller.loop.call_later(_LOOK_S, ask)

        controller.loop.add_callback_from_signal(ask)

    SysHandler.quit = quit_until_heard


def check_port() -> None:
    """In the arbiter: raises `ValueError` where the port that `bentoml serve` shall listen on is taken."""
    command = click.get_current_context(silent=True)  # none where a program serves, which sees the error itself
    if command is None or command.info_name != "serve":
        return
    host = command.params["host"] or ""  # without one: on every address
    port = command.params["port"] or BentoMLContainer.http.port.get()
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"cannot listen on {host or 'any address'}, port {port}: {error.strerror}") from error


def end_with_workers() -> None:
    """In the arbiter: when a worker gives up, stop the others and exit with status 1."""
    has_failed = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal has_failed
        has_failed = True
        signal.raise_signal(signal.SIGTERM)

    def end() -> None:
        if has_failed:
            os._exit(1)  # the arbiter, once stopped, would end with 0

    atexit.register(end)  # runs after all that is registered later
    signal.signal(signal.SIGUSR1, stop)


def give_up(reason: object) -> NoReturn:
    """In a worker: say why in one line, and end it and the arbiter."""
    logger.error("the service does not start: %s", reason)
    logging.shutdown()
    os.kill(os.getppid(), signal.SIGUSR1)
    os._exit(1)
