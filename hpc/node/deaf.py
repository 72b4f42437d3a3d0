"""Threads that take no signal: one that the kernel gave them would not reach the main thread, which acts on it.

Slurm sends CONT and TERM together, which makes it likely.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def deaf() -> Iterator[None]:
    """Threads that are started in the block take no signal: a thread starts with its maker's mask."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def deaf_thread(target: Callable[[], None]) -> threading.Thread:
    """A started daemon thread that takes no signal."""
    thread = threading.Thread(target=target, daemon=True)
    with deaf():
        thread.start()
    return thread
