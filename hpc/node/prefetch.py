"""Images to this node's disk ahead of time: the payload of a staging job, and what `hpc images stage` does here.

python3 -m hpc.node.prefetch STAGE_DIR ATTEMPT_DIR
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpc.core import rundir
from hpc.core.rundir import AttemptDir
from hpc.node.payload import Document, run
from hpc.node.staging import Staging, Tell, in_words, staged


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """One image on one node."""

    copied: bool
    """False: it was there."""
    bytes: int
    seconds: float

    def __str__(self) -> str:
        """In words.

        >>> print(Fetched(copied=True, bytes=533_000_000, seconds=0.52))
        staged, 0.53 GB in 0.5 s (1.02 GB/s)
        >>> print(Fetched(copied=False, bytes=533_000_000, seconds=0.002))
        already there (2.0 ms)
        """
        if not self.copied:
            return f"already there ({self.seconds * 1000:.1f} ms)"
        size = self.bytes / 1e9
        return f"staged, {size:.2f} GB in {self.seconds:.1f} s ({size / max(self.seconds, 1e-3):.2f} GB/s)"


def fetch(wish: Staging, tell: Tell = lambda done, total, rate: None) -> Fetched:
    """Have the image here. Errors are those of `staged`."""
    copied: list[int] = []

    def note(done: int, total: int, rate: float) -> None:
        if done:
            copied.append(done)
        tell(done, total, rate)

    begin = time.monotonic()
    with staged(wish, note) as path:
        return Fetched(copied=bool(copied), bytes=path.stat().st_size, seconds=time.monotonic() - begin)


def _all(document: Document, attempt: AttemptDir) -> Mapping[str, Any]:
    return {name: asdict(_one(name, Staging(**wish), attempt)) for name, wish in document["config"]["images"].items()}


def _one(name: str, wish: Staging, attempt: AttemptDir) -> Fetched:
    def tell(done: int, total: int, rate: float) -> None:
        rundir.append_event(attempt.events, "staging", done=done, total=total, message=in_words(name, total, rate))

    found = fetch(wish, tell)
    print(f"{name}: {found}", flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:], _all))
