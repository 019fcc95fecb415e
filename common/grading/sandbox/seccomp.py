"""The system calls that a program under test may make, as a seccomp-BPF filter.

A list of what is allowed: a call that is not on it, today's or tomorrow's, fails with EACCES. So there are no sockets,
no other processes, no signals to anybody, and files can be opened for reading only.
"""

import errno
import platform
import struct
from collections.abc import Iterable

# Numbers from the kernel's asm/unistd_64.h and asm-generic/unistd.h.
_X86_64 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37,
    "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96,
    "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "pipe2": 293, "getrandom": 318,
    "statx": 332, "rseq": 334, "faccessat2": 439,
    "open": 2, "clone": 56, "fcntl": 72, "openat": 257, "clone3": 435,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "dup": 23, "dup3": 24, "faccessat": 48, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62,
    "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73,
    "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98,
    "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
    "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
    "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165, "gettimeofday": 169, "getpid": 172,
    "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179,
    "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
    "statx": 291, "rseq": 293, "faccessat2": 439,
    "clone": 220, "fcntl": 25, "openat": 56, "clone3": 435,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
MACHINES = tuple(_MACHINES)
_X32 = 0x4000_0000  # calls with this bit are x86-64's second table

# What an argument must be: its position, the bits that matter, and the values that these may have.
_WRITING = 0o1103  # O_WRONLY | O_RDWR | O_CREAT | O_TRUNC
_THREAD = 0x10000  # CLONE_THREAD
_HARMLESS_COMMANDS = (0, 1, 2, 3, 4, 1030)  # F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC; F_SETOWN would send signals
_CONDITIONS = {
    "open": (1, _WRITING, (0,)),
    "openat": (2, _WRITING, (0,)),
    "clone": (0, _THREAD, (_THREAD,)),
    "fcntl": (1, 0xFFFF_FFFF, _HARMLESS_COMMANDS),
}

_LOAD, _AND, _JUMP_IF_EQUAL, _JUMP_IF_GREATER_OR_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a machine (this one), as an array of `struct sock_filter`; KeyError if it is not in MACHINES."""
    architecture, numbers = _MACHINES[machine or platform.machine()]
    steps = [
        _step(_LOAD, _MACHINE_AT),
        _step(_JUMP_IF_EQUAL, architecture, yes=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
        _step(_JUMP_IF_GREATER_OR_EQUAL, _X32, no=1),
        _step(_RETURN, _KILL),
    ]
    for name, number in numbers.items():
        answer = list(_answer(name))
        steps += [_step(_JUMP_IF_EQUAL, number, no=len(answer)), *answer]
    return b"".join([*steps, _step(_RETURN, _FAIL | errno.EACCES)])


def _answer(name: str) -> Iterable[bytes]:
    if name == "clone3":  # its flags are in memory, out of a filter's sight: glibc takes clone instead
        yield _step(_RETURN, _FAIL | errno.ENOSYS)
    elif name in _CONDITIONS:
        position, bits, values = _CONDITIONS[name]
        yield _step(_LOAD, _ARGUMENTS_AT + 8 * position)  # the lower half: both machines are little-endian
        yield _step(_AND, bits)
        for value in values:
            yield _step(_JUMP_IF_EQUAL, value, no=1)
            yield _step(_RETURN, _ALLOW)
        yield _step(_RETURN, _FAIL | errno.EACCES)
    else:
        yield _step(_RETURN, _ALLOW)


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)
