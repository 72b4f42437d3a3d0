"""Ends jobs: by job id in Slurm, by process on this machine; leaves a note, so that the end is known as asked for."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from hpc.core import rundir
from hpc.core.errors import RuntimeUnavailable
from hpc.core.rundir import RunDir, StageDir
from hpc.login import batch, slurm, succession
from hpc.login.states import StageState
from hpc.node.enter import alive, elsewhere

_GRACE_S = 10


def cancel(run: RunDir, chosen: Sequence[StageState]) -> None:
    """End these stages, the last of the pipeline first, so that none starts because one before it ended."""
    for state in chosen:
        process = rundir.read_json(run.stage(state.stage).attempt(state.attempt).process) or {}
        if host := elsewhere(process):
            what = f"{run.id}/{state.stage}"
            raise RuntimeUnavailable(
                f"{what} runs on {host}, and can be ended there alone", hint=f"ssh {host}, then hpc cancel {what}"
            )
    jobs = []
    for state in reversed(chosen):
        folder = run.stage(state.stage)
        if state.scheduler == "slurm":
            jobs += [*succession.withdraw(folder), state.job_id]
        rundir.write_json(folder.attempt(state.attempt).stop, {"by": "hpc cancel", "t": time.time()})
    if jobs:
        slurm.cancel(jobs)
    _local([s for s in reversed(chosen) if s.scheduler == "local"])


def _local(chosen: Sequence[StageState]) -> None:
    """SIGTERM lets a stage save its work; SIGKILL to the whole group after the grace time."""
    written = (rundir.read_json(StageDir(Path(s.folder)).attempt(s.attempt).process) for s in chosen)
    processes = [process for process in written if process is not None]
    for process in processes:
        batch.stop_local(process)
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        while alive(process["pid"], process["start"]):
            if time.monotonic() > deadline:
                batch.stop_local(process, signal.SIGKILL)
                break
            time.sleep(0.05)
