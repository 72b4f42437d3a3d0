"""A few places for many nodes, as files on the shared file system: so that not all read one image at once.

flock may be off on NFS and Lustre; creating a file that must not exist yet works on all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpc.core import stale

_LOOK_S = 0.2
_STALE_S = 30
"""A place whose holder has not touched it for so long is free: its node died, or was killed."""


@contextmanager
def slot(folder: Path, count: int, waiting: Callable[[], bool] = lambda: True) -> Iterator[Callable[[], None]]:
    """Hold one of `count` places for as long as the block runs; gives the function that keeps it.

    `waiting` is called now and then until there is one; the block runs without a place where it says False.
    A folder that cannot be written gives no limit: staging is more important than politeness.
    """
    held = _take(folder, count, waiting) if count > 0 else None
    try:
        yield lambda: _touch(held)
    finally:
        if held is not None:
            held.unlink(missing_ok=True)


def _take(folder: Path, count: int, waiting: Callable[[], bool]) -> Path | None:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                place = folder / f"slot-{number}"
                with suppress(FileExistsError):
                    os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                    return place
                stale.free(place, _STALE_S)
        except OSError:
            return None
        if not waiting():
            return None
        time.sleep(_LOOK_S)


def _touch(place: Path | None) -> None:
    if place is not None:
        with suppress(OSError):
            os.utime(place)
