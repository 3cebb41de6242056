"""How the service starts and stops, in BentoML's arbiter (the parent process, circus) and in its workers.

A start that fails ends the whole service with status 1; BentoML would start the worker again every 10 s forever while
callers hang. At SIGTERM a worker finishes the requests that it has accepted; BentoML would close connections at once.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MethodType
from typing import Any, NoReturn

import bentoml
import click
import uvicorn
from bentoml._internal.configuration.containers import BentoMLContainer  # where `bentoml serve` itself looks
from circus.arbiter import Arbiter
from circus.client import make_json
from circus.exc import ConflictError
from circus.sighandler import SysHandler
from circus.watcher import Watcher

from embedder.errors import EmbedderError, system_limit
from embedder.http.drain import Drain
from embedder.settings import heartbeat_file, is_log_json
from embedder.telemetry.log import JsonLines

logger = logging.getLogger(__name__)

POLL_S = 0.05  # between checks whether a draining worker has requests left
PARENT_POLL_S = 1.0
MIN_HANG_S = 20.0  # a shorter pause may only mean that the machine is busy
SENDING_S = 5  # after the drain, for responses that are being sent
IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)  # like SIGHUP; people and tools send them to other servers
START_FAILED = signal.SIGVTALRM  # from a worker to the arbiter; nobody sends it by hand


# In the arbiter


def refuse_start(reason: object) -> NoReturn:
    """Exit with status 1 and one line that says why the service does not start. For before a worker runs."""
    message = f"the service does not start: {reason}"
    if is_log_json():
        message = JsonLines().format(logging.makeLogRecord({"name": __name__, "levelname": "ERROR", "msg": message}))
    raise SystemExit(message)


def handle_signals() -> None:
    """Make the arbiter obey a SIGTERM that arrives while it starts a worker, and ignore SIGHUP and `IGNORED`.

    circus executes one command at a time and drops another that arrives meanwhile, so the command is repeated. At
    SIGHUP it would start a second worker while the first one drains: requests get 503 until it is ready, and on a GPU
    without memory for both, the start would fail and end the service. `IGNORED` would end it without a line in the log.
    """

    def repeat_quit(handler: SysHandler) -> None:
        controller = handler.controller

        def quit_unless_stopping() -> None:
            if not controller.arbiter._stopping:  # has no public name
                controller.dispatch((None, make_json("quit")))
                controller.loop.call_later(PARENT_POLL_S, quit_unless_stopping)

        controller.loop.add_callback_from_signal(quit_unless_stopping)

    def log_ignored(signum: int, _: FrameType | None = None) -> None:
        logger.warning("%s is ignored. To change settings, restart the service", signal.Signals(signum).name)

    SysHandler.quit, SysHandler.reload = repeat_quit, lambda _: log_ignored(signal.SIGHUP)
    for signum in IGNORED:
        signal.signal(signum, log_ignored)


def exit_when_a_worker_fails_to_start() -> None:
    """When a worker calls `fail_start`, stop the other workers and exit with status 1."""
    has_failed = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal has_failed
        has_failed = True
        signal.raise_signal(signal.SIGTERM)

    def exit_with_failure() -> None:
        if has_failed:
            os._exit(1)  # the arbiter, once stopped, would exit with 0

    atexit.register(exit_with_failure)  # runs after everything that is registered later
    signal.signal(START_FAILED, stop)


def replace_dead_workers_at_once() -> None:
    """When a worker ends although nobody has asked it to, log a line and start another one.

    circus by itself looks every 10 s, and logs nothing.
    """
    call_hook, manage_watchers = Watcher.call_hook, Arbiter.manage_watchers
    running: dict[int, Watcher] = {}  # by process id; workers whose end is not logged

    async def look(arbiter: Arbiter) -> None:
        with contextlib.suppress(ConflictError):  # circus is looking or starting a worker; it looks again soon
            await manage_watchers(arbiter)

    def log_end(watcher: Watcher, pid: int, exit_code: int) -> None:
        consequence = "a new one starts" if watcher.respawn else "in a container it is not replaced"
        logger.error("%s; %s", _how_it_ended(pid, exit_code), consequence)

    def log_unreaped(watcher: Watcher) -> None:
        """Circus drops a worker without reaping it if it looks while some threads of it have yet to end."""
        for pid in [pid for pid, owner in running.items() if owner is watcher and pid not in watcher.processes]:
            del running[pid]
            with contextlib.suppress(ChildProcessError):
                log_end(watcher, pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    def log_and_call_hook(watcher: Watcher, hook_name: str, **arguments: Any) -> Any:
        if hook_name in ("before_spawn", "before_stop"):
            log_unreaped(watcher)
        if hook_name == "after_spawn":
            running[arguments["pid"]] = watcher
            signal.signal(signal.SIGCHLD, lambda *_: watcher.loop.add_callback_from_signal(look, watcher.arbiter))
        if hook_name == "after_reap":
            running.pop(arguments["process_pid"], None)
            if watcher.is_active():
                log_end(watcher, arguments["process_pid"], arguments["exit_code"])
        return call_hook(watcher, hook_name, **arguments)

    Watcher.call_hook = log_and_call_hook
    Arbiter.manage_watchers = look  # circus's own look, every 10 s, would log a traceback if it met another one


def end_hanging_workers(max_s: float) -> None:
    """Kill a worker that is stopped (SIGSTOP) for more than `max_s` seconds, or whose event loop does not run for that
    long and for more than `MIN_HANG_S`; another one replaces it.

    Its callers would wait without an end. Time is counted in looks, so a pause of the whole service does not count.
    """
    call_hook = Watcher.call_hook
    max_hang_s = max(max_s, MIN_HANG_S)

    def look(watcher: Watcher, pid: int, last_beat: int | None, stopped_s: float, silent_s: float) -> None:
        if pid not in watcher.processes:
            return
        beat = _last_beat(pid)
        stopped_s = stopped_s + PARENT_POLL_S if _is_stopped(pid) else 0.0
        silent_s = silent_s + PARENT_POLL_S if beat is not None and beat == last_beat else 0.0
        if stopped_s > max_s or silent_s > max_hang_s:
            what = ("has been stopped", max_s) if stopped_s else ("has not run its event loop", max_hang_s)
            logger.error("a worker (process %d) %s for more than %g s and is killed", pid, *what)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        watcher.loop.call_later(PARENT_POLL_S, look, watcher, pid, beat, stopped_s, silent_s)

    def watch_and_call_hook(watcher: Watcher, hook_name: str, **arguments: Any) -> Any:
        if hook_name == "after_spawn":
            pid = arguments["pid"]
            if path := heartbeat_file(pid):
                path.unlink(missing_ok=True)  # of an earlier process with the same id
            watcher.loop.call_later(PARENT_POLL_S, look, watcher, pid, None, 0.0, 0.0)
        return call_hook(watcher, hook_name, **arguments)

    Watcher.call_hook = watch_and_call_hook


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended, or this is not Linux
        return False


def _last_beat(pid: int) -> int | None:
    """When the worker's event loop ran last, in nanoseconds; None if it has not begun, or the folder was deleted."""
    path = heartbeat_file(pid)
    try:
        return path.stat().st_mtime_ns if path else None
    except OSError:
        return None


def _how_it_ended(pid: int, exit_code: int) -> str:
    if exit_code >= 0:
        return f"a worker (process {pid}) ended with status {exit_code}"
    hint = " (out of memory? see the kernel's log)" if exit_code == -signal.SIGKILL else ""
    return f"a worker (process {pid}) was killed by signal {-exit_code}{hint}"


def check_port() -> None:
    """Raise `ValueError` if the port that `bentoml serve` is to listen on is taken."""
    command = click.get_current_context(silent=True)  # None if a program serves, which sees the error itself
    if command is None or command.info_name != "serve":
        return
    check_address(command.params["host"] or "", command.params["port"] or BentoMLContainer.http.port.get())


def check_address(host: str, port: int) -> None:
    """Raise `ValueError` if nothing can listen on this port of `host`. An empty host is every address."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)  # `strerror` repeats the address
        raise ValueError(f"cannot listen on {host or 'any address'}, port {port}: {reason}") from error


# In a worker


@contextmanager
def failing_start() -> Iterator[None]:
    """End the service if the block raises: with one line, or with a traceback if it is a bug."""
    try:
        yield
    except Exception as error:
        if not bentoml.server_context.worker_index:  # a program runs the service, not BentoML's arbiter
            raise
        if isinstance(error, EmbedderError):
            fail_start(error)
        if limit := system_limit(error):
            fail_start(f"a limit of the system is reached: {limit.reason}")
        logger.exception("bug: the start failed")
        fail_start(type(error).__name__)


def fail_start(reason: object) -> NoReturn:
    """Log why the service does not start, and end this worker and the arbiter."""
    logger.error("the service does not start: %s", reason)
    logging.shutdown()
    os.kill(os.getppid(), START_FAILED)
    os._exit(1)


def worker_server() -> uvicorn.Server:
    """Return the server of this worker, which handles SIGTERM already and accepts no connections yet."""
    handler = signal.getsignal(signal.SIGTERM)
    assert isinstance(handler, MethodType)
    server = handler.__self__
    assert isinstance(server, uvicorn.Server)
    return server


def drain_at_sigterm(drain: Drain, server: uvicorn.Server, max_s: float) -> None:
    """From now on, SIGTERM reaches the server when no request is left, or after `max_s` seconds.

    The limit is for callers that never read their response.
    """
    loop = asyncio.get_running_loop()
    server.config.timeout_graceful_shutdown = SENDING_S  # without it the server waits forever

    def stop_when_idle(signum: int, until_s: float) -> None:
        if drain.num_requests and loop.time() < until_s:
            loop.call_later(POLL_S, stop_when_idle, signum, until_s)
        else:
            server.handle_exit(signum, None)

    def begin(signum: int, _: FrameType | None) -> None:
        drain.is_draining = True
        loop.call_soon_threadsafe(stop_when_idle, signum, loop.time() + max_s)

    signal.signal(signal.SIGTERM, begin)


def keep_in_touch(arbiter: int) -> None:
    """Show the parent every second that the event loop runs, for `end_hanging_workers`.

    Send this worker SIGTERM when its parent is gone; otherwise it would keep the port and the GPU forever.
    """
    loop = asyncio.get_running_loop()
    heartbeat = heartbeat_file(os.getpid())

    def check_parent() -> None:
        if heartbeat:
            with contextlib.suppress(OSError):  # temporary files were deleted, or the disk is full: nothing is judged
                heartbeat.touch()
        if os.getppid() == arbiter:
            loop.call_later(PARENT_POLL_S, check_parent)
        else:
            signal.raise_signal(signal.SIGTERM)

    check_parent()
