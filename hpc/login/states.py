"""Where every stage of a run stands: from the run's files, one squeue and at most one sacct, for any number of jobs."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc.core import endpoint as endpoints
from hpc.core import rundir
from hpc.core.errors import HpcError, RuntimeUnavailable
from hpc.core.rundir import RunDir, StageDir
from hpc.login import doing, slurm
from hpc.login.slurm import ENDED
from hpc.node import outcome
from hpc.node.enter import alive, elsewhere, gone

_CLOCK_SKEW_S = 5

ACTIVE = frozenset(
    "PENDING RUNNING CONFIGURING COMPLETING SUSPENDED REQUEUED RESIZING SIGNALING STAGE_OUT STOPPED".split()
)
SERVING = frozenset({"ready", "ending"})
"""The phases in which a service answers."""
NOT_SUBMITTED = "NOT_SUBMITTED"
LOST = "LOST"
"""Ended, and neither the run's files nor Slurm know how."""
_GONE = "its result is gone: hpc submit makes it again where it is needed"
UNKNOWN = "UNKNOWN"
"""Slurm cannot be asked at this moment."""


@dataclass(frozen=True, kw_only=True)
class StageState:
    """One stage of one run, as `hpc status` tells it."""

    run: str
    stage: str
    state: str
    """Slurm's word (PENDING, RUNNING, COMPLETED, …), or NOT_SUBMITTED, or LOST."""
    key: str
    scheduler: str
    job_id: str = ""
    attempt: int = 0
    reason: str = ""
    """Why it waits, or how it ended, in words."""
    hint: str = ""
    node: str = ""
    elapsed_s: float | None = None
    limit_min: int | None = None
    submitted: float | None = None
    phase: str = ""
    """starting, checking, staging, running, stopping: how far a running job is."""
    done: float | None = None
    total: float | None = None
    message: str = ""
    endpoint: str = ""
    """Where a service answers, as NODE:PORT; empty until it does."""
    successor: str = ""
    """The job that takes over from a service, at the latest before its time limit."""
    figures: Mapping[str, Any] | None = None
    """How much it does, as it says itself: running, done, failed, tokens_s, queue_ms, kv_use."""
    exit_code: int | None = None
    resumable: bool = False
    reused: str = ""
    """The earlier run whose result stands in."""
    folder: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def _me() -> str:
    """The name that Slurm knows us by: LOGNAME and USER may be another's after su or sudo."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


@dataclass
class Scheduler:
    """Slurm's answers for one call of `hpc`, asked for at most once each."""

    user: str = field(default_factory=_me)
    call: slurm.Run = slurm.run
    problem: HpcError | None = None
    """Set where Slurm could not be asked."""
    asked_at: float = 0.0
    """When squeue was asked, seconds since 1970; what was submitted later it cannot know."""
    _queue: dict[str, slurm.Queued] | None = None

    def queue(self) -> Mapping[str, slurm.Queued]:
        if self._queue is None:
            self._queue, self.asked_at = {}, time.time()
            try:
                self._queue = slurm.queue(self.user, self.call)
            except RuntimeUnavailable as error:
                self.problem = error
        return self._queue

    def by_comment(self, comment: str) -> slurm.Queued | None:
        return next((job for job in self.queue().values() if job.comment == comment), None)


@dataclass(frozen=True, kw_only=True)
class _Submitted:
    """A stage with its latest job.json."""

    run: RunDir
    stage_dir: StageDir
    key: str
    job: Mapping[str, Any]


def states(runs: Iterable[tuple[RunDir, Mapping[str, Any]]], scheduler: Scheduler) -> list[StageState]:
    """The state of every stage of these runs, in the order of the runs and of their pipelines."""
    found: list[StageState | None] = []
    open_ones: list[tuple[int, _Submitted]] = []
    for run, asked in runs:
        for name, key in asked["keys"].items():
            submitted = _Submitted(run=run, stage_dir=run.stage(name), key=key, job=_job(run.stage(name)))
            state = _from_files(submitted, scheduler)
            if state is None:
                open_ones.append((len(found), submitted))
            found.append(state)
    if open_ones:
        for place, state in _from_accounting(open_ones, scheduler):
            found[place] = state
    return [_in_words(s) for s in found if s is not None]


def _job(folder: StageDir) -> Mapping[str, Any]:
    """Its job.json; {} where there is none, or it is not whole."""
    job = rundir.read_json(folder.job) or {}
    whole = {"attempt", "status", "scheduler", "job_id", "comment", "submitted"} <= job.keys()
    return job if whole or "reused" in job else {}


def _base(submitted: _Submitted, **values: Any) -> StageState:
    job = submitted.job
    known: dict[str, Any] = {
        "run": submitted.run.id,
        "stage": submitted.stage_dir.name,
        "key": submitted.key,
        "scheduler": job.get("scheduler", ""),
        "job_id": str(job.get("job_id") or ""),
        "attempt": job.get("attempt", 0),
        "limit_min": job.get("limit_min"),
        "submitted": job.get("submitted"),
        "folder": str(submitted.stage_dir.path),
    }
    return StageState(**{**known, **values})


def _from_files(submitted: _Submitted, scheduler: Scheduler) -> StageState | None:
    """The state where the run's files and squeue tell it; None where only the accounting can."""
    job = submitted.job
    if not job:
        return _base(submitted, state=NOT_SUBMITTED, reason="submit again to complete the run")
    if "reused" in job:
        source = RunDir(submitted.run.path.parent / job["reused"]).stage(submitted.stage_dir.name)
        if not source.made(submitted.key):
            return _base(submitted, state=NOT_SUBMITTED, reason=f"its result in {job['reused']} is gone: submit again")
        reason = _GONE if source.emptied(submitted.key) else f"taken from {job['reused']}"
        return _base(submitted, state="COMPLETED", reused=job["reused"], reason=reason)
    attempt = submitted.stage_dir.attempt(job["attempt"])
    if job["status"] == "submitting" and _at_work(job.get("submitter")):
        return _base(submitted, state="PENDING", reason="being submitted")
    if job["scheduler"] == "local":
        return _local(submitted, attempt)
    queued = _queued(job, scheduler)
    if queued is not None and queued.state not in ENDED:
        return _live(submitted, attempt, queued)
    ended = outcome.read(attempt)
    if ended is not None and (queued is not None or scheduler.problem is not None or not _ambiguous(ended, attempt)):
        return _ended(submitted, ended, queued.state if queued else None)
    if ended is not None:
        return None  # only the accounting remembers
    if queued is not None:
        return _without_outcome(submitted, attempt, queued.state, queued.nodes)
    if scheduler.problem is not None:
        return _base(submitted, state=UNKNOWN, reason="Slurm cannot be reached")
    if job["submitted"] >= scheduler.asked_at:  # while we were reading; squeue could not know it yet
        return _base(submitted, state="PENDING")
    if job["status"] == "submitting":
        return _base(submitted, state=NOT_SUBMITTED, reason="submit again to complete the run")
    return None


def _at_work(submitter: Mapping[str, Any] | None) -> bool:
    """True while the hpc that submits this stage runs, on this machine, and is not ourselves."""
    return (
        submitter is not None
        and submitter["host"] == os.uname().nodename
        and submitter["pid"] != os.getpid()
        and alive(submitter["pid"], submitter["start"])
    )


def _ambiguous(ended: Mapping[str, Any], attempt: rundir.AttemptDir) -> bool:
    """True where the node saw SIGTERM and no more: cancelled by hand, preempted, or its node was taken away."""
    return ended["state"] == "CANCELLED" and bool(ended.get("resumable")) and not attempt.stop.exists()


def _queued(job: Mapping[str, Any], scheduler: Scheduler) -> slurm.Queued | None:
    """The job in squeue: by id AND comment, since ids start again when a controller loses its state."""
    if not job.get("job_id"):
        return scheduler.by_comment(job["comment"])
    queued = scheduler.queue().get(str(job["job_id"]))
    return queued if queued is not None and queued.comment == job["comment"] else None


def _live(submitted: _Submitted, attempt: rundir.AttemptDir, queued: slurm.Queued) -> StageState:
    state = _base(submitted, state=queued.state, job_id=queued.job_id, node=queued.nodes, reason="")
    if queued.state == "PENDING":
        return replace(state, reason=queued.reason)
    return _running(state, attempt, queued.start)


def _running(state: StageState, attempt: rundir.AttemptDir, start: float | None) -> StageState:
    """A running stage with its phase and progress from the last lines of events.jsonl."""
    elapsed = time.time() - start if start else None
    events = rundir.last_events(attempt.events)
    last = events[-1] if events else {"phase": "starting"}
    state = replace(state, elapsed_s=elapsed, phase=last["phase"], message=last.get("message", ""))
    folder = StageDir(Path(state.folder))
    if state.phase in SERVING and (found := endpoints.read(folder)) is not None:
        later = rundir.read_json(folder.attempt(state.attempt + 1).successor) or {}
        state = replace(
            state,
            endpoint=found.address,
            successor=str(later.get("job_id") or ""),
            figures=doing.read(folder, found.ready),
        )
        return state if state.message else replace(state, message=doing.in_words(state.figures))
    # how far the image's copy is, is no news once the stage has begun
    latest = next((e for e in reversed(events) if e.get("total") and _copies(e) == _copies(last)), None)
    if latest is None:
        return state
    message = latest.get("message", "") + (f", loss {latest['loss']:.3f}" if "loss" in latest else "")
    return replace(state, done=latest["done"], total=latest["total"], message=message)


def _copies(event: Mapping[str, Any]) -> bool:
    return bool(event["phase"] == "staging")


def _ended(submitted: _Submitted, ended: Mapping[str, Any], slurm_says: str | None = None) -> StageState:
    """From outcome.json; where Slurm knows a definite cause that the node could only guess, Slurm's word."""
    state, reason, hint = ended["state"], ended.get("cause", ""), ended.get("hint", "")
    resumable = ended.get("resumable", False)
    if state != "COMPLETED" and slurm_says in _DEFINITE and slurm_says != state:
        state, (reason, hint) = slurm_says, _ENDS[slurm_says]
        resumable = state in _RESUMABLE
    elif state == "COMPLETED" and not os.path.exists(submitted.stage_dir.manifest):
        state, reason, hint = "FAILED", "its manifest.json is gone", "submit again"
    elif state == "COMPLETED" and submitted.stage_dir.emptied(submitted.key):
        reason = _GONE
    return _base(
        submitted,
        state=state,
        reason=reason,
        hint=hint,
        node=ended.get("host", ""),
        elapsed_s=ended["ended"] - ended["started"] if {"started", "ended"} <= ended.keys() else None,
        exit_code=ended.get("exit_code"),
        resumable=resumable,
    )


def _local(submitted: _Submitted, attempt: rundir.AttemptDir) -> StageState:
    job, ended = submitted.job, outcome.read(attempt)
    process = rundir.read_json(attempt.process)
    if process is not None:
        submitted = replace(submitted, job={**job, "job_id": process["pid"]})  # hpc may have been killed before it knew
    host = elsewhere(process) if process is not None else ""
    if process is not None and not gone(attempt, process):
        events = rundir.last_events(attempt.events)
        if not any(e["phase"] in {"running", "staging", "checking"} for e in events) and not attempt.launch.exists():
            return _base(submitted, state="PENDING", reason="Dependency" if job.get("after") else "starting", node=host)
        return _running(_base(submitted, state="RUNNING", node=host or os.uname().nodename), attempt, _started(attempt))
    if ended is not None:
        return _ended(submitted, ended)
    if attempt.stop.exists():
        return _base(submitted, state="CANCELLED", reason="cancelled by hpc cancel")
    if process is None:
        return _base(submitted, state=NOT_SUBMITTED, reason="submit again to complete the run")
    why = f"no sign of life from {host}" if host else "its process is gone: killed, or the machine restarted"
    return _base(submitted, state=LOST, reason=why, node=host)


def _started(attempt: rundir.AttemptDir) -> float | None:
    """When the payload began: launch.json is written just before."""
    try:
        return attempt.launch.stat().st_mtime
    except OSError:
        return None


def _without_outcome(submitted: _Submitted, attempt: rundir.AttemptDir, state: str, node: str) -> StageState:
    """Ended by Slurm before the node could write an outcome."""
    if attempt.stop.exists() and state in {"CANCELLED", "FAILED"}:
        return _base(submitted, state="CANCELLED", reason="cancelled by hpc cancel", node=node)
    if state == "FAILED" and _slurm_says_oom(attempt):
        state = "OUT_OF_MEMORY"
    reason, hint = _ENDS.get(state, ("", "`hpc logs` shows what is known"))
    if state == "CANCELLED" and not attempt.events.exists():
        reason, hint = "cancelled before it began: by hand, or because its input failed", ""
    if state == "COMPLETED":
        os.listdir(submitted.stage_dir.path)  # else NFS may still say that there is no manifest
        if submitted.stage_dir.done(submitted.key):
            return _base(submitted, state=state, node=node)
        state = "FAILED"
    resumable = state in _RESUMABLE
    return _base(submitted, state=state, reason=reason, hint=hint, node=node, resumable=resumable)


_RESUMABLE = {"TIMEOUT", "PREEMPTED", "NODE_FAIL"}
_DEFINITE = {*_RESUMABLE, "OUT_OF_MEMORY"}
_ENDS = {
    "TIMEOUT": ("the time limit was reached", "submit again: it goes on from its last checkpoint"),
    "OUT_OF_MEMORY": (
        "it needed more host memory than was asked for",
        "ask for more: resources = { mem_gb = … }",
    ),
    "NODE_FAIL": ("its node failed", "submit again: it goes on from its last checkpoint"),
    "PREEMPTED": (
        "a job of higher priority took its place",
        "submit again: it goes on from its last checkpoint",
    ),
    "CANCELLED": ("cancelled", ""),
    "COMPLETED": ("it ended without writing its outcome", "submit again"),
}


def _slurm_says_oom(attempt: rundir.AttemptDir) -> bool:
    logs = list(attempt.scheduler.glob("*_log.err"))
    return any("oom" in line.lower() or "memory limit" in line for log in logs for line in rundir.tail(log))


def _from_accounting(open_ones: list[tuple[int, _Submitted]], scheduler: Scheduler) -> Iterable[tuple[int, StageState]]:
    ids = [str(s.job["job_id"]) for _, s in open_ones]
    known = slurm.accounting(ids, scheduler.call)
    for place, submitted in open_ones:
        record = known.get(str(submitted.job["job_id"]))
        attempt = submitted.stage_dir.attempt(submitted.job["attempt"])
        ended = outcome.read(attempt)
        if ended is not None:
            yield place, _ended(submitted, ended, record.state if record else None)
        elif record is None or (record.submit or 0) < submitted.job["submitted"] - _CLOCK_SKEW_S:
            yield place, _unknown(submitted, attempt)
        elif record.state in ENDED:
            yield place, _without_outcome(submitted, attempt, record.state, record.nodes)
        else:  # it lags a few seconds behind the controller, which has forgotten the job
            yield place, _unknown(submitted, attempt)


def _unknown(submitted: _Submitted, attempt: rundir.AttemptDir) -> StageState:
    """No longer in Slurm, nothing written: cancelled by us, or gone without a trace."""
    if attempt.stop.exists():
        return _base(submitted, state="CANCELLED", reason="cancelled by hpc cancel")
    return _base(
        submitted,
        state=LOST,
        reason="Slurm no longer knows the job, and it wrote no outcome",
        hint="submit again: what is done stays done",
    )


def _in_words(state: StageState) -> StageState:
    return replace(state, reason=REASONS.get(state.reason, state.reason)) if state.state == "PENDING" else state


REASONS = {
    "Resources": "waits for free resources",
    "Priority": "others go first (priority)",
    "Dependency": "waits for the stage before it",
    "DependencyNeverSatisfied": "its input failed: it will never run",
    "BeginTime": "starts again in a moment",
    "JobHeldUser": "held by you: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "PartitionNodeLimit": "asks for more nodes than the partition allows",
    "PartitionDown": "the partition is down",
    "ReqNodeNotAvail": "a node it asks for is not available",
    "QOSMaxJobsPerUserLimit": "your qos allows no more jobs at once",
    "QOSGrpGRES": "your qos has no GPUs left",
    "AssocGrpGRES": "your account has no GPUs left",
    "None": "",
}
"""Slurm's reasons in words; an unknown one is shown as it is."""
