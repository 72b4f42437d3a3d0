"""Images to this node's disk ahead of time: the payload of a staging job, and what `hpc images stage` does here.

python3 -m hpc.node.prefetch STAGE_DIR ATTEMPT_DIR
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.errors import HpcError
from hpc.core.rundir import AttemptDir, StageDir
from hpc.node.staging import Staging, Tell, staged

Document = Mapping[str, Any]


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
        copied.append(done)
        tell(done, total, rate)

    begin = time.monotonic()
    with staged(wish, note) as path:
        return Fetched(copied=bool(copied), bytes=path.stat().st_size, seconds=time.monotonic() - begin)


def payload(argv: list[str], work: Callable[[Document, AttemptDir], Mapping[str, Any]]) -> int:
    """Do the work as a stage's payload outside any image. It leaves a manifest; error.json where it cannot be done."""
    stage_dir, attempt = StageDir(Path(argv[0])), AttemptDir(Path(argv[1]))
    document = rundir.read_json(stage_dir.config) or {}
    started = time.time()
    try:
        metrics = work(document, attempt)
    except HpcError as error:
        rundir.write_json(attempt.error, {"cause": error.message, "hint": error.hint, "exit_code": error.exit_code})
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    manifest = {
        "schema": "hpc.manifest/1",
        **{name: document[name] for name in ("stage", "key", "inputs", "environment", "outputs")},
        "metrics": metrics,
        "versions": {"python": sys.version.split()[0]},
        "started": started,
        "ended": time.time(),
        "host": os.uname().nodename,
    }
    rundir.write_json(stage_dir.manifest, manifest, durable=True)
    return 0


def _all(document: Document, attempt: AttemptDir) -> Mapping[str, Any]:
    return {name: asdict(_one(name, Staging(**wish), attempt)) for name, wish in document["config"]["images"].items()}


def _one(name: str, wish: Staging, attempt: AttemptDir) -> Fetched:
    def tell(done: int, total: int, rate: float) -> None:
        message = f"{name} {rate / 1e9:.1f} GB/s" if rate else f"waits for its turn to copy {name}"
        rundir.append_event(attempt.events, "staging", done=done, total=total, message=message)

    found = fetch(wish, tell)
    print(f"{name}: {found}", flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(payload(sys.argv[1:], _all))
