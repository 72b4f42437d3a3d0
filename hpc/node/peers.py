"""Why a job of several nodes failed: the node that failed first knows it, the others lost their connection to it."""

from __future__ import annotations

import re
import time
from dataclasses import replace

from hpc.core.rundir import AttemptDir
from hpc.node import outcome
from hpc.node.outcome import Outcome

_WAIT_S = 5.0
_POLL_S = 0.2
_LOST = re.compile(
    r"[Cc]onnection (closed|reset)|Broken pipe|gloo|NCCL|ProcessGroup|TCPStore|DistBackendError|DistNetworkError"
)


def first(end: Outcome, attempt: AttemptDir, nodes: int, since: float) -> Outcome:
    """The end of the job's first node, or that of another whose failure it only noticed."""
    if end.state != "FAILED" or nodes == 1 or not (end.signal or _LOST.search(end.cause)):
        return end
    deadline = time.monotonic() + _WAIT_S
    while (other := failed(attempt, nodes, since)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return other or end


def failed(attempt: AttemptDir, nodes: int, since: float) -> Outcome | None:
    """How another node of this job failed since then, where it did and was the cause."""
    for number in range(1, nodes):
        ended = outcome.read(attempt.of_task(number))
        if ended is None or ended["ended"] < since or ended["state"] not in {"FAILED", "OUT_OF_MEMORY"}:
            continue
        if not _LOST.search(ended["cause"]):
            known = {name: ended[name] for name in ("state", "exit_code", "signal", "cause", "hint", "log_tail")}
            return replace(Outcome(**known), cause=f"on {ended['host']}: {ended['cause']}")
    return None
