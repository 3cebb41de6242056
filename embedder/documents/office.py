"""An office file -> a PDF, by LibreOffice if it is installed.

LibreOffice needs files, threads and processes of its own, so it cannot be confined as strictly as the process that
renders pages. It gets a new profile folder, in which macros and links to other files are disabled. It can access only
the machine's programs and fonts, its own folder, and local sockets. Its memory, file size and time are limited, and its
whole process group is killed at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from embedder.documents.office_process import SOCKET_FOLDER
from embedder.errors import InvalidMedia, MediaTooLarge
from embedder.inputs.decoder import ProcessKilled, repeated_if_killed
from embedder.settings import decoder_environment

OFFICE_SUFFIXES = (".doc", ".docx", ".odp", ".ods", ".odt", ".ppt", ".pptx", ".rtf", ".xls", ".xlsx")
PROGRAMS = ("soffice", "libreoffice")
TIMEOUT_S = 120.0  # the first start of a version of LibreOffice takes several seconds
MAX_OFFICE_BYTES = 2**28
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # statuses: the second is that of LibreOffice's launcher

# What LibreOffice reads of the machine: programs, libraries, fonts and their settings. No file of a user is there.
READABLE = (
    *("/usr", "/bin", "/lib", "/lib64", "/var/lib/libreoffice", "/var/spool/libreoffice"),
    *("/etc/fonts", "/etc/libreoffice", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime", "/etc/passwd"),
    *("/etc/group", "/etc/nsswitch.conf", "/etc/locale.alias", "/var/cache/fontconfig"),
    *("/proc/cpuinfo", "/proc/meminfo", "/dev/urandom", "/dev/random"),
)
WRITABLE = ("/dev/null",)  # and its own folder

_START = (
    "import sys, json; sys.path[:], *arguments = json.loads(sys.argv[1]); "
    "from embedder.documents.office_process import main; main(*arguments)"
)
# Names of LibreOffice's own settings. Level 3 runs only macros of trusted places, of which there are none.
_PROFILE = """<?xml version="1.0" encoding="UTF-8"?>
<oor:items xmlns:oor="http://openoffice.org/2001/registry">
<item oor:path="/org.openoffice.Office.Common/Security/Scripting"><prop oor:name="MacroSecurityLevel" oor:op="fuse">
<value>3</value></prop></item>
<item oor:path="/org.openoffice.Office.Common/Security/Scripting"><prop oor:name="DisableMacrosExecution" oor:op="fuse">
<value>true</value></prop></item>
<item oor:path="/org.openoffice.Office.Common/Security/Scripting"><prop oor:name="DisableActiveContent" oor:op="fuse">
<value>true</value></prop></item>
<item oor:path="/org.openoffice.Office.Common/Security/Scripting"><prop oor:name="BlockUntrustedRefererLinks"
 oor:op="fuse"><value>true</value></prop></item>
</oor:items>
"""


def find_program() -> str | None:
    """The path of LibreOffice; None if it is not installed."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def convert_to_pdf(source: Path, target: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Write the PDF of an office file to `target`, complete or not at all. Raises `InvalidMedia`, `MediaTooLarge`.

    If somebody has killed LibreOffice, most often the kernel, it is started once more.
    """
    repeated_if_killed(lambda: _convert_once(source, target, timeout_s))


def _convert_once(source: Path, target: Path, timeout_s: float) -> None:
    program = find_program()
    if program is None:
        raise InvalidMedia("an office file needs LibreOffice, which is not installed; install it, or convert to PDF")
    with tempfile.TemporaryDirectory(prefix="office-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        document = work / f"document{source.suffix.lower()}"  # a name of a caller could be an option
        try:
            num_bytes = source.stat().st_size
            if not num_bytes:  # LibreOffice would make an empty page of it
                raise InvalidMedia("the document is empty (0 bytes)")
            if num_bytes > MAX_OFFICE_BYTES:
                raise MediaTooLarge(f"office file of {num_bytes} bytes; allowed: up to {MAX_OFFICE_BYTES}")
            shutil.copyfile(source, document)
        except OSError as error:
            raise InvalidMedia(f"the document cannot be read: {error.strerror}") from error
        status = _convert(program, document, work, timeout_s)
        made = work / "out" / "document.pdf"
        if status in KILLED:
            raise ProcessKilled("LibreOffice was killed while it converted this file; is the machine out of memory?")
        if made.is_symlink() or not made.is_file():
            raise InvalidMedia("LibreOffice cannot convert this file; it is damaged, or needs a password")
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(made, temporary)
        temporary.rename(target)


def _convert(program: str, document: Path, work: Path, timeout_s: float) -> int:
    """Run LibreOffice twice: to complete its new profile, after which it starts again, and then on the document.

    Returns the last status.

    Only the first run, which reads nothing of a caller, may remove the socket between its two starts.
    """
    user = work / "profile" / "user"
    user.mkdir(parents=True)
    (user / "registrymodifications.xcu").write_text(_PROFILE)
    profile = (work / "profile").as_uri()
    command = [program, "--headless", "--norestore", "--nolockcheck", "--nodefault", "--nologo"]
    command.append(f"-env:UserInstallation={profile}")
    deadline = time.monotonic() + timeout_s
    socket = Path(SOCKET_FOLDER, f"OSL_PIPE_{os.getuid()}_SingleOfficeIPC_{_socket_hash(profile)}")
    try:
        _run([*command, "--terminate_after_init"], work, deadline, [SOCKET_FOLDER])
        return _run([*command, "--convert-to", "pdf", "--outdir", str(work / "out"), str(document)], work, deadline, [])
    except subprocess.TimeoutExpired as error:
        raise MediaTooLarge(f"converting the office file took more than {timeout_s:g} s; convert it to PDF") from error
    finally:
        socket.unlink(missing_ok=True)


def _run(command: Sequence[str], work: Path, deadline: float, writable: Sequence[str]) -> int:
    """Run a command of LibreOffice -> its status. Kills every process of its group. Raises `TimeoutExpired`."""
    paths = [os.path.abspath(path) for path in (*sys.path, str(Path(__file__).parents[2])) if path]
    readable = [*READABLE, _installation(command[0])]
    arguments = paths, os.getpid(), command, readable, [*WRITABLE, *writable, str(work)]
    process = subprocess.Popen(  # noqa: S603 - the arguments are ours
        [sys.executable, "-I", "-S", "-c", _START, json.dumps(arguments)],
        env={**decoder_environment(), "HOME": str(work), "TMPDIR": str(work), "PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _socket_hash(profile: str) -> str:
    """How LibreOffice names the socket of a profile (`OfficeIPCThread` in its source)."""
    digest = hashlib.md5(profile.encode("utf-16-le"), usedforsecurity=False).digest()
    return "".join(f"{byte:x}" for byte in digest)


def _installation(program: str) -> str:
    """The folder of the program's own files: that of `program/soffice`, or only the one that the program is in."""
    folder = Path(program).resolve().parent
    return str(folder.parent if folder.name == "program" else folder)
