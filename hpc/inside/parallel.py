"""The same work on many cores, its results in order: they do not tell how many cores there were. Standard library."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, TypeVar

from hpc.core.errors import HpcError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 3
"""So many tasks for each process are handed out ahead: what waits in memory is bounded."""


def cores() -> int:
    """The CPUs that this process may use: as the kernel allows, and no more than Slurm gave the task."""
    allowed = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(allowed, int(given)) if given.isdigit() else allowed)


class Workers:
    """Processes that work until the block ends; with one of them, all is done in this process."""

    def __init__(self, count: int, modules: Sequence[str] = ()) -> None:
        self._count = count
        self._modules = modules
        """Imported once, for all processes."""
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """function(task) of each task, in their order. An error is raised where its result would come."""
        if self._count == 1:
            yield from map(function, tasks)
            return
        if self._pool is None:
            # not by fork: a fork of a process with threads (BLAS, Arrow) can hang
            context = get_context("forkserver")
            context.set_forkserver_preload(list(self._modules))
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_begin)
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(function, task))
                if len(waiting) >= self._count * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise HpcError(
                "one of the processes was ended from outside", hint="perhaps for its memory: raise resources.mem_gb"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _begin() -> None:
    """A worker ends with the process it works for, not by the scheduler's warning: what it holds is still wanted."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_with_parent() -> None:
    """By this, and not by PDEATHSIG: to the kernel the parent is the fork server, which ends when its workers have."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
