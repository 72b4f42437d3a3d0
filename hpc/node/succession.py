"""Whether a service's job may still start, where others are to follow it or to be followed by it."""

from __future__ import annotations

from hpc.core import rundir
from hpc.core.rundir import StageDir
from hpc.node import outcome
from hpc.node.outcome import Outcome

_FOLLOWED = {"COMPLETED", "TIMEOUT", "PREEMPTED", "NODE_FAIL"}
"""Ends that a successor is there for."""


def refused(folder: StageDir, attempt: int) -> Outcome | None:
    """Why this job must not start; None where it may."""
    current = (rundir.read_json(folder.job) or {}).get("attempt", attempt)
    if current > attempt:
        return Outcome(state="CANCELLED", exit_code=1, cause=f"attempt {current} of this service has taken over")
    if current == attempt:
        return None
    ended = outcome.read(folder.attempt(current))
    if ended is None or ended["state"] in _FOLLOWED:
        return None
    return Outcome(
        state="CANCELLED", exit_code=1, cause=f"the job that it was to take over from has ended: {ended['state']}"
    )
