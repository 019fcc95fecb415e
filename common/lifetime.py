"""Processes that end with the one that started them, however that ends, which only Linux can do; who is alive."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Let this process be killed as soon as the thread ends that started it; `parent` is the id of that process."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os.kill(os.getpid(), signal.SIGKILL)


def is_alive(process: int) -> bool:
    """Whether a process of this machine has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def has_launcher() -> bool:
    """Whether this process's parent is torchrun or DeepSpeed's launcher, which starts the ranks of one job."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"))


def die_with_launcher() -> None:
    """Let a rank end with its launcher, if it has one, which ends its ranks, but not if it is killed."""
    if not has_launcher() or sys.platform != "linux":
        return
    launcher = os.getppid()
    # Init has adopted this process, unless it is the launcher, as in a container: then it runs the same Python.
    if launcher == 1 and os.path.realpath("/proc/1/exe") != os.path.realpath("/proc/self/exe"):
        os.kill(os.getpid(), signal.SIGKILL)
    die_with(launcher)
