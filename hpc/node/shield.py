"""The container's FUSE helpers, kept from the scheduler's signals and from outliving the job.

Without setuid, Apptainer mounts the image by a helper, squashfuse. Slurm signals every process of a step: USR2, the
warning before the time limit, would kill the helper, and with it every import of the payload's checkpoint handler.
So this process becomes the helpers' tracer (ptrace, as a debugger): such a signal then comes here first, and is
dropped. The kernel kills what a tracer that ends leaves traced, so no helper outlives the job, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hpc.node.deaf import deaf_thread

HELPERS = frozenset({"squashfuse_ll", "squashfuse", "fuse-overlayfs", "fuse2fs", "gocryptfs"})
SHIELDED = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})

_SEIZE, _CONT, _LISTEN, _O_EXITKILL, _EVENT_STOP = 0x4206, 7, 0x4208, 0x00100000, 128  # linux/ptrace.h
_WALL = 0x40000000
"""waitpid: a traced process that is not our child, too."""
_SOON_S, _LATER_S = 0.01, 1.0
_STARTING_S = 10.0


@contextlib.contextmanager
def shielded(container: int, refused: Callable[[str], None] = lambda why: None) -> Iterator[None]:
    """While the block runs, shield the helpers that the container's process starts; after it, end what is left of them.

    `refused` is told where the system does not let us trace: the job goes on as it would without.
    """
    shields: dict[int, threading.Thread] = {}
    over = threading.Event()
    tell_once = functools.cache(refused)

    def look() -> None:
        changed = time.monotonic()
        while not over.is_set():
            for pid in helpers(container) - shields.keys():
                changed = time.monotonic()
                shields[pid] = deaf_thread(functools.partial(_shield, pid, tell_once))
            # the first is one that only tells its options, and ends
            over.wait(_SOON_S if time.monotonic() - changed < _STARTING_S else _LATER_S)

    looking = deaf_thread(look)
    try:
        yield
    finally:
        over.set()
        looking.join()
        for pid, thread in shields.items():
            if thread.is_alive():  # so it has not been reaped, and its number is no other's
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                thread.join(1)


def helpers(container: int) -> set[int]:
    """The helpers among the children of the container's process: one of another user or job is never touched."""
    found: set[int] = set()
    with contextlib.suppress(OSError):  # it ends while we look
        for task in Path(f"/proc/{container}/task").iterdir():
            for pid in (task / "children").read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().strip() in HELPERS:
                    found.add(int(pid))
    return found


def _shield(pid: int, refused: Callable[[str], None]) -> None:
    """Trace one helper to its end. All in one thread: only the tracing thread may command the traced."""
    if error := _ptrace(_SEIZE, pid, _O_EXITKILL):
        if error != errno.ESRCH:
            refused(os.strerror(error))
        return
    while True:
        try:
            _, status = os.waitpid(pid, _WALL)
        except ChildProcessError:
            return
        if not os.WIFSTOPPED(status):
            return
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            _ptrace(_LISTEN, pid)  # stopped, as `scontrol suspend` does: let it stay so until CONT
        else:
            _ptrace(_CONT, pid, 0 if event or number in SHIELDED else number)


def _ptrace(request: int, pid: int, data: int = 0) -> int:
    """The errno; 0 where it worked."""
    import ctypes  # here and not above: the login node imports this module, and needs no ctypes

    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    call.restype = ctypes.c_long
    return ctypes.get_errno() if call(request, pid, None, data) else 0
