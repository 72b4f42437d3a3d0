"""Files that hold a place on a shared file system, left behind by a process that died."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path


def free(place: Path, seconds: float) -> None:
    """Remove the file where it was not touched for so long, by the file server's own clock: the nodes' may differ.

    Of several that see it stale, one succeeds. OSError where its folder cannot be written to.
    """
    probe = place.with_name(f".now-{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    with suppress(FileNotFoundError):
        if now - place.stat().st_mtime > seconds:
            os.rename(place, probe)
            if now - probe.stat().st_mtime > seconds:
                probe.unlink()
            else:  # another one was faster, and has taken it
                os.rename(probe, place)
