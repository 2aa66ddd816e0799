"""Ties a process to the one that started it."""

import contextlib
import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "_REPERTORY_PARENT"


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Does nothing on a kernel without that call.

    A killed supervisor must leave no process behind that holds its ports, its sockets or the GPU. If the environment is that of `child_environment` and
    the parent has ended already, this process ends at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)


def child_environment() -> dict[str, str]:
    """Return this process's environment, and in it the process's number for a child that calls `die_with_parent` and starts no such child itself."""
    return {**os.environ, PARENT_VARIABLE: str(os.getpid())}
