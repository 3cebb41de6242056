"""The process that becomes LibreOffice, after it has given up what converting a file does not need."""

from __future__ import annotations

import contextlib
import os
import resource

from embedder.inputs import sandbox

ADDRESS_SPACE = 4 * 2**30
MAX_FILE_BYTES = 2**30
MAX_CPU_S = 300
SOCKET_FOLDER = "/tmp"  # noqa: S108 - LibreOffice does not start without a socket there, whatever TMPDIR is


def main(parent: int, command: list[str], readable: list[str], writable: list[str]) -> None:
    """Confine this process and execute the command. `parent`: process id. `readable`, `writable`: files and folders."""
    sandbox.die_with_parent(parent)
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_CPU, MAX_CPU_S),
    ):
        with contextlib.suppress(ValueError, OSError):  # the hard limit is lower already
            resource.setrlimit(kind, (limit, limit))
    sandbox.restrict_files(readable, writable, [SOCKET_FOLDER])
    sandbox.refuse_network()
    os.execv(command[0], command)  # noqa: S606 - the arguments are ours
