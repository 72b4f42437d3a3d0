"""The scheduler's requests to end, each told once: its copies stop here, before any handler.

One request reaches the process up to three times: from Slurm, which signals all processes of a step, and passed on by
`hpc.node.enter` and by Apptainer. A handler that is interrupted by its own copy, while it imports what it saves with,
finds half a module (AttributeError: partially initialized module), and the save is lost.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

REQUESTS = frozenset({signal.SIGUSR2, signal.SIGTERM})

Handler = Callable[[int, FrameType | None], Any]
_signal = signal.signal


def told_once() -> None:
    """From now on whatever a stage or a library installs with `signal.signal` for a request hears it once.

    Another request, as TERM after USR2, is told too. Children of the process are not concerned.
    """
    signal.signal = _install  # type: ignore[assignment]


def _install(number: int, handler: Any) -> Any:
    return _signal(number, once(handler) if number in REQUESTS and callable(handler) else handler)


def once(handler: Handler) -> Handler:
    """The handler, without the copies of a signal that it has been told."""
    told: set[int] = set()

    def first(number: int, frame: FrameType | None) -> None:
        if number not in told:
            told.add(number)
            handler(number, frame)

    return first
