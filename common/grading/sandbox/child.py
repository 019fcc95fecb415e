"""The process that a program under test runs in; `sandbox.run` starts it, with the standard library alone.

It reports SET_UP and COMPILED when it has come so far, then the nonce if every test passed, else what failed.
Every program pays for what is imported here: `typing` alone would be a quarter of it.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import os
import resource
import struct
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SET_UP, COMPILED = b"+", b"*"
MAX_REPORT_BYTES = 512

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_SIGKILL, _SIGEV_SIGNAL, _CLOCK_MONOTONIC = 9, 0, 1
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_EVERY_ACCESS, _READ_FILE, _READ_FOLDER = 0x1FFF, 0x4, 0x8
_READABLE = (
    *(f"{prefix}/{name}" for prefix in (sys.base_prefix, "/usr", "") for name in ("lib", "lib64")),
    *("/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"),
)


class _Filter(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def main() -> None:
    with open(0, "rb") as file:
        program, tests, nonce, parent, seconds, memory_bytes, filter_program = marshal.load(file)
    null = os.open(os.devnull, os.O_RDWR)  # takes the place of standard input
    report = os.dup(1)
    os.dup2(null, 1)
    try:
        call = _library()
        _end_in_time(call, parent, seconds)
        _limit_resources(seconds, memory_bytes)
        call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _limit_reading(call)
        steps = _Filter(len(filter_program) // 8, filter_program)
        call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(steps), 0, 0)
    except (OSError, ValueError) as error:
        os.write(report, str(error).encode()[:MAX_REPORT_BYTES])
        return
    os.write(report, SET_UP)
    os.environ.clear()
    judge(program, tests, nonce, report)


def _library() -> Callable[..., int]:
    """A C function by its name, called with words and pointers; OSError where it fails."""
    library = ctypes.CDLL("librt.so.1", use_errno=True)  # libc too; before glibc 2.34 timers are here only

    def call(name: str, *arguments: object) -> int:
        words = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
        result = int(getattr(library, name)(*words))
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        return result

    return call


def _end_in_time(call: Callable[..., int], parent: int, seconds: float) -> None:
    """Let the kernel end this process when its parent has gone or its time is over, whatever it does."""
    call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise OSError("the grading process has gone")
    timer = ctypes.c_void_p()
    event = struct.pack("Pii48x", 0, _SIGKILL, _SIGEV_SIGNAL)
    call("timer_create", _CLOCK_MONOTONIC, event, ctypes.byref(timer))
    whole, rest = divmod(seconds, 1)
    call("timer_settime", timer, 0, struct.pack("4l", 0, 0, int(whole), int(rest * 1e9)), None)


def _limit_resources(seconds: float, memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: int(seconds) + 2,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _limit_reading(call: Callable[..., int]) -> None:
    """Hide all files but Python's own with Landlock; a kernel without it lets the program read what the user may."""
    try:
        rules = call("syscall", _LANDLOCK_CREATE_RULESET, struct.pack("Q", _EVERY_ACCESS), 8, 0)
    except OSError:
        return
    for path in filter(os.path.exists, _READABLE):
        access = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", access, place)
        call("syscall", _LANDLOCK_ADD_RULE, rules, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        os.close(place)
    call("syscall", _LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def judge(program: str, tests: list[tuple[str, str]], nonce: bytes, report: int) -> None:
    """Run the program, then its tests in its namespace.

    What the program could replace is bound before it runs, and each step gets built-ins of its own. A program that
    walks the frames of its callers still finds the nonce.
    """
    write, leave, execute, pristine = os.write, os._exit, exec, dict(vars(builtins)).copy
    steps, step = [], "the program"
    try:
        steps.append((step, compile(program, step, "exec", dont_inherit=True)))
        steps += [(name, compile(test, name, "exec", dont_inherit=True)) for name, test in tests]
    except BaseException as error:  # noqa: BLE001  the compiler raises whatever it likes on a strange text
        write(report, f"{type(error).__name__}: {error}".encode(errors="replace")[:MAX_REPORT_BYTES])
        leave(0)
    write(report, COMPILED)
    sys.modules["solution"] = types.ModuleType("solution")
    namespace = vars(sys.modules["solution"])
    try:
        for step, code in steps:  # noqa: B007  the step that fails is reported
            namespace["__builtins__"] = pristine()
            execute(code, namespace)
        write(report, nonce)
    except BaseException as error:  # noqa: BLE001  so does the program
        write(report, f"{step}: {type(error).__name__}".encode(errors="replace")[:MAX_REPORT_BYTES])
    finally:
        leave(0)


if __name__ == "__main__":
    main()
