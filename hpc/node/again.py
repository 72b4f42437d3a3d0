"""A job that saved its work at the time limit is queued again by itself, as often as the site allows."""

from __future__ import annotations

import os
import subprocess

from hpc.core.errors import STOPPED
from hpc.node.outcome import Outcome

_PATIENCE_S = 30


def wanted(end: Outcome, times: int) -> bool:
    """Preempted jobs and those of a lost node Slurm queues again without being asked."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return end.state == "TIMEOUT" and end.exit_code == STOPPED and restarts < times


def requeue() -> str:
    """Ask for it; why it was refused, or "". Slurm ends this process on the way: all must be written down before."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr or done.stdout).strip() if done.returncode else ""
