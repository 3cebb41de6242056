"""What a decoding process may do: compute, and use the memory and the socket that it has. Nothing else.

Limits of resources apply everywhere. On Linux with x86-64 or ARM a seccomp filter refuses every system call that is not
in the list, among them those that open files, create sockets, start processes or send signals. Threads are allowed,
because the decoder of HEIC starts one. Neither needs a privilege, so both work in a container without capabilities and
with a read-only root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import stat
import struct
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_MAX_OPEN_FILES = 32

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of `_ALLOWED`, and AUDIT_ARCH_*
# Instructions of classic BPF: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_JMP|BPF_JGE|BPF_K, BPF_RET|BPF_K
_LOAD, _EQUAL, _AT_LEAST, _GIVE = 0x20, 0x15, 0x35, 0x06
# SECCOMP_RET_ALLOW, _ERRNO with EPERM and with ENOSYS, _KILL_PROCESS
_GIVE_ALLOW, _GIVE_REFUSE, _GIVE_UNKNOWN, _GIVE_KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_AF_UNIX = 1
_SOCKET = (41, 198)  # the numbers of the system call `socket` on x86-64 and ARM
_REFUSED = {  # what connects, or could do so unseen
    "connect": (42, 203),
    "io_uring_setup": (425, 425),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
}
# Landlock's system calls, the same on both machines, and its rights by the version that has brought them
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION, _PATH_BENEATH = 1, 1
_FILE_RIGHTS = {1: 0x1FFF, 2: 0x2000, 3: 0x4000, 5: 0x8000}
_READ_RIGHTS = 0b1101  # execute, read a file, read a folder
_MAKE_SOCKET = 0x200
_RIGHTS_OF_A_FILE = 0b111 | 0x4000 | 0x8000  # execute, write, read, truncate, control a device
_SCOPES = 0b11  # abstract sockets, signals
_ANY = (0, None)
_CLONE3 = 435  # its flags are in memory, where no filter can read them; glibc then uses clone
# Name: number on x86-64, number on ARM, and the argument that must have a certain value.
_ALLOWED: dict[str, tuple[int, int, tuple[int, int | None]]] = {
    "read": (0, 63, _ANY),
    "write": (1, 64, _ANY),
    "close": (3, 57, _ANY),
    "fstat": (5, 80, _ANY),
    "poll": (7, 73, _ANY),  # ppoll on ARM
    "lseek": (8, 62, _ANY),
    "mmap": (9, 222, _ANY),
    "mprotect": (10, 226, _ANY),
    "munmap": (11, 215, _ANY),
    "brk": (12, 214, _ANY),
    "rt_sigaction": (13, 134, _ANY),
    "rt_sigprocmask": (14, 135, _ANY),
    "rt_sigreturn": (15, 139, _ANY),
    "pread64": (17, 67, _ANY),
    "sched_yield": (24, 124, _ANY),
    "mremap": (25, 216, _ANY),
    "madvise": (28, 233, _ANY),
    "nanosleep": (35, 101, _ANY),
    "getpid": (39, 172, _ANY),
    "recvfrom": (45, 207, _ANY),
    "sendto": (44, 206, _ANY),
    "sendmsg": (46, 211, _ANY),
    "recvmsg": (47, 212, _ANY),
    "clone": (56, 220, (0, 0x3D0F00)),  # only a thread, with the flags of pthread_create
    "exit": (60, 93, _ANY),
    "fcntl": (72, 25, (1, 1030)),  # only F_DUPFD_CLOEXEC: others can send signals
    "gettimeofday": (96, 169, _ANY),
    "getrusage": (98, 165, _ANY),
    "sigaltstack": (131, 132, _ANY),
    "gettid": (186, 178, _ANY),
    "futex": (202, 98, _ANY),
    "sched_getaffinity": (204, 123, _ANY),
    "restart_syscall": (219, 128, _ANY),
    "clock_gettime": (228, 113, _ANY),
    "clock_getres": (229, 114, _ANY),
    "clock_nanosleep": (230, 115, _ANY),
    "exit_group": (231, 94, _ANY),
    "set_robust_list": (273, 99, _ANY),
    "newfstatat": (262, 79, (3, 0x1000)),  # only AT_EMPTY_PATH: of an open file
    "prlimit64": (302, 261, (0, 0)),  # only of this process
    "getcpu": (309, 168, _ANY),
    "getrandom": (318, 278, _ANY),
    "membarrier": (324, 283, _ANY),
    "rseq": (334, 293, _ANY),
}


def die_with_parent(parent: int) -> None:
    """End this process when the thread that started it ends, or at once if the process `parent` is gone already."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def be_killed_first() -> None:
    """If memory is short, the kernel ends this process, whose items are repeated, and not the one that serves."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("500")


def limit_resources() -> None:
    """No core dump, no file with content, few open files. Memory and CPU time are limited for each task."""
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        with contextlib.suppress(ValueError, OSError):  # the hard limit is lower already
            resource.setrlimit(kind, (limit, limit))


def limit_task(address_space: int, cpu_s: float) -> None:
    """Limit the address space in bytes, and the CPU time from now on; over the latter the kernel ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = address_space if hard == resource.RLIM_INFINITY else min(address_space, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(used.ru_utime + used.ru_stime + cpu_s) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def refuse_system_calls() -> bool:
    """Refuse, from now on, every system call that is not in the list. False where the platform cannot do that."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return False
    return _prctl(_PR_SET_DUMPABLE, 0) and _install(_program(*_MACHINES[platform.machine()]))


def refuse_network() -> bool:
    """Refuse all connections, and all sockets except local ones, also in every program that this process executes."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return False
    return _install(_network_program(*_MACHINES[platform.machine()]))


def restrict_files(readable: Sequence[str], writable: Sequence[str], with_sockets: Sequence[str]) -> bool:
    """Refuse access to files outside these paths, from now on and in every program that this process executes.

    `with_sockets`: folders in which local sockets may be made, and nothing else may be done.
    By Landlock (Linux 5.13), which also keeps signals and abstract sockets inside where it can (6.12). A path that does
    not exist is left out. What is readable can be executed too. Returns False where the kernel cannot do it.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return False
    handled = sum(bits for since, bits in _FILE_RIGHTS.items() if since <= version)
    attributes = struct.pack("QQQ", handled, 0, _SCOPES)[: 24 if version >= 6 else 8]
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        for paths, rights in ((readable, _READ_RIGHTS), (writable, handled), (with_sockets, _MAKE_SOCKET)):
            for path in paths:
                _allow_path(libc, ruleset, path, rights & handled)
        return _prctl(_PR_SET_NO_NEW_PRIVS, 1) and libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allow_path(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _RIGHTS_OF_A_FILE
        rule = struct.pack("=Qi", rights, descriptor)  # struct landlock_path_beneath_attr
        libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)


def _install(code: bytes) -> bool:
    """Make a filter of system calls of these instructions."""
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: number of instructions, address of the first
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
    return _prctl(_PR_SET_NO_NEW_PRIVS, 1) and _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _program(column: int, architecture: int) -> bytes:
    """The filter as instructions of classic BPF: operation, jump if true, jump if false, value."""
    load, equal, give, allow, refuse, kill = _LOAD, _EQUAL, _GIVE, _GIVE_ALLOW, _GIVE_REFUSE, _GIVE_KILL
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    for call in _ALLOWED.values():
        number, (argument, value) = (call[0], call[1])[column], call[2]
        if value is None:
            steps += [(equal, 0, 1, number), (give, 0, 0, allow)]
        else:  # the low half of the argument; the kernel reads no more of these
            place = 16 + 8 * argument
            steps += [(equal, 0, 4, number), (load, 0, 0, place), (equal, 0, 1, value), (give, 0, 0, allow)]
            steps += [(give, 0, 0, refuse)]
    steps += [(equal, 0, 1, _CLONE3), (give, 0, 0, _GIVE_UNKNOWN), (give, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _network_program(column: int, architecture: int) -> bytes:
    """As `_program`: refuse sockets unless they are local ones, and the calls of `_REFUSED`."""
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_GIVE, 0, 0, _GIVE_KILL), (_LOAD, 0, 0, 0)]
    if column == 0:  # numbers from here on are those of x32, another way to the same calls
        steps += [(_AT_LEAST, 0, 1, 0x40000000), (_GIVE, 0, 0, _GIVE_REFUSE)]
    for numbers in _REFUSED.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), (_GIVE, 0, 0, _GIVE_REFUSE)]
    steps += [(_EQUAL, 0, 3, _SOCKET[column]), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, _AF_UNIX)]
    steps += [(_GIVE, 0, 0, _GIVE_REFUSE), (_GIVE, 0, 0, _GIVE_ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _prctl(option: int, value: int, address: int = 0) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    return bool(libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(address), zero, zero) == 0)


def open_memory_file() -> int:
    """A file descriptor for `address_space`; -1 where the platform has no such file."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def address_space(memory_file: int) -> int:
    """Bytes of address space that this process uses; 0 where the platform does not say."""
    return int(os.pread(memory_file, 100, 0).split()[0]) * resource.getpagesize() if memory_file >= 0 else 0
