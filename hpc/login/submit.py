"""A plan -> jobs. Every step leaves files from which `hpc status` can tell, and `hpc submit` can go on."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hpc
from hpc.core import rundir
from hpc.core.errors import HpcError, Interrupted, RuntimeUnavailable, UsageError
from hpc.core.plan import Plan
from hpc.core.rundir import RunDir, RunsDir, StageDir
from hpc.login import batch, slurm, snapshot, succession
from hpc.login.facts import container_program, expand, link_targets
from hpc.login.place import Ground, Placed, place
from hpc.login.settings import Settings
from hpc.login.states import NOT_SUBMITTED, Scheduler, StageState, states
from hpc.node.enter import process_start
from hpc.node.launch import argument_without_secrets

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a plan means here and now: the run, and which stages are still to be submitted."""

    plan: Plan
    run: RunDir
    is_new: bool
    code: str
    standing: Mapping[str, StageState]
    """The stages of this run that were submitted before -> where they stand."""
    reused: Mapping[str, StageDir]
    """The stages that another run has done already -> their folder there."""
    placed: tuple[Placed, ...]
    """All stages of the plan, placed; `todo` are those to submit."""
    site_name: str
    scheduler: str
    successors: Mapping[str, tuple[Placed, ...]] = field(default_factory=dict)
    """Service -> the jobs that are to take over from the one that is submitted now, or from the one that serves."""

    @property
    def todo(self) -> tuple[Placed, ...]:
        return tuple(p for p in self.placed if p.name not in self.reused and not self._stands(p.name))

    def _stands(self, name: str) -> bool:
        state = self.standing.get(name)
        ending = state is not None and state.state == "COMPLETING" and name in self.services
        return state is not None and not ending and (state.active or self._done(name))

    def dependency(self, placed: Placed, ids: Mapping[str, str]) -> str | None:
        """Slurm's --dependency for the stages that it waits for; @STAGE stands for an id that isn't known yet."""
        waiting = [n for n in placed.planned.needs if n not in self.reused and not self._done(n)]
        return "afterok:" + ":".join(ids.get(n, f"@{n}") for n in waiting) if waiting else None

    def _done(self, name: str) -> bool:
        state = self.standing.get(name)
        return state is not None and state.state == "COMPLETED" and name not in self.services

    @property
    def services(self) -> set[str]:
        """The stages that serve: one that has ended is no result."""
        return {p.name for p in self.plan.stages if p.stage.service}

    def saved(self) -> tuple[float, float]:
        """(seconds, GPU seconds) that stages which are done need not run again."""
        seconds = gpu_seconds = 0.0
        for placed in self.placed:
            folder = self.reused.get(placed.name) or (placed.stage_dir if self._done(placed.name) else None)
            manifest = rundir.read_json(folder.manifest) if folder else None
            if manifest is not None and {"started", "ended"} <= manifest.keys():
                spent = manifest["ended"] - manifest["started"]
                seconds += spent
                gpu_seconds += spent * placed.planned.resources.gpus
        return seconds, gpu_seconds

    def known_ids(self) -> dict[str, str]:
        return {name: s.job_id for name, s in self.standing.items() if s.active}


@dataclass(kw_only=True)
class Timings:
    """Seconds of a submission's parts, for the benchmark and --verbose."""

    imports: float = 0.0
    snapshot: float = 0.0
    jobs: float = 0.0
    submitted: list[str] = field(default_factory=list)


NOT_IN_A_NAME = {":": "colon", "%": "percent sign"}
"""Of a run's folder: PYTHONPATH, by which the jobs find its code, is parted by the one; Slurm and submitit replace the
other's words (%j)."""


def prepare(plan: Plan, settings: Settings, target: str, scheduler: Scheduler, *, replace: bool = False) -> Submission:
    """Find the run that this plan continues, or the number of its new one, and place every stage in it.

    With `replace` the service that is asked for gets a successor at once.
    """
    runs = RunsDir(settings.project.runs)
    code = snapshot.digest()
    everything = list(runs.runs())
    found = _same(plan, everything, code)
    run = found or runs.next(target)
    for letter, word in NOT_IN_A_NAME.items():
        if letter in str(run.path):
            raise UsageError(
                f"the jobs cannot be given the run folder {run.path}: there is a {word} in its name",
                hint="set `runs` in hpc.toml (or HPC_RUNS) to a folder without one",
            )
    str(run.path).encode()  # UnicodeEncodeError, which is told of, where no file of the run could name it
    standing = _standing(run, plan, everything, scheduler) if found else {}
    own = {n: _result_of(run.stage(n)) for n, s in standing.items() if s.state == "COMPLETED"}
    finished = _finished(plan, run, own, everything)
    reused = {name: folder for name, folder in finished.items() if folder != own.get(name)}
    for name in own.keys() - finished.keys():  # it is not there any more, and needed
        standing[name] = dataclasses.replace(standing[name], state=NOT_SUBMITTED)
    uses_images = any(p.environment.kind == "sif" for p in plan.stages)
    ground = Ground(
        run=run,
        site=settings.site,
        attempts={name: succession.next_attempt(run.stage(name), s.attempt) for name, s in standing.items()},
        finished=finished,
        program=container_program(settings.site) if uses_images else "",
        cache=runs.cache,
        hub_home=os.environ.get("HF_HOME"),
        scratch=expand(settings.site.scratch) if settings.site.scratch else None,
        uid=os.getuid(),
        links=link_targets(path for p in plan.stages for path in p.reads),
    )
    if replace:
        succession.refuse(plan, target, standing, settings.site)
    return Submission(
        plan=plan,
        run=run,
        is_new=found is None,
        code=code,
        standing=standing,
        reused=reused,
        placed=place(plan, ground),
        site_name=settings.site.name,
        scheduler=settings.site.scheduler,
        successors=succession.placed(plan, ground, standing, target if replace else None),
    )


def submit(work: Submission, settings: Settings, scheduler: Scheduler, say: Say) -> Timings:
    """Write the run's files and queue the stages. Where one is rejected, those before it are withdrawn."""
    timings = Timings()
    clock = time.perf_counter()
    batch.preload()
    timings.imports, clock = time.perf_counter() - clock, time.perf_counter()
    _write_run(work, settings)
    timings.snapshot, clock = time.perf_counter() - clock, time.perf_counter()
    _refuse_two(work)
    ids = work.known_ids()
    submitted: list[Placed] = []
    try:
        for placed in work.todo:
            record = placed.stage_dir.job
            ids[placed.name] = _submit_one(work, placed, work.dependency(placed, ids), scheduler, record)
            submitted.append(placed)
            timings.submitted.append(placed.name)
            say(f"{work.run.id}/{placed.name}: submitted as job {ids[placed.name]}")
        for name, later in work.successors.items():
            _submit_successors(work, later, ids[name] if name in timings.submitted else None, scheduler, say)
    except KeyboardInterrupt:
        names = ", ".join(p.name for p in submitted) or "nothing"
        raise Interrupted(
            f"interrupted: {names} of {work.run.id} was submitted",
            hint="the same `hpc submit` again completes it",
        ) from None
    except (HpcError, OSError, ValueError) as error:
        _withdraw(work, submitted, ids, keep=isinstance(error, batch.AnswerLost))
        raise
    timings.jobs = time.perf_counter() - clock
    return timings


class TakenError(RuntimeUnavailable):
    """Another hpc has taken the number of a new run, for something else: the next one is free."""


def anew(work: Submission, settings: Settings, scheduler: Scheduler) -> Submission:
    """The same, in the run with the next free number."""
    return prepare(work.plan, settings, work.run.id.rpartition("-")[0], scheduler)


def _refuse_two(work: Submission) -> None:
    """RuntimeUnavailable where another hpc is at this very run: its jobs have no numbers yet to depend on."""
    busy = next((s for s in work.standing.values() if s.active and not s.job_id), None)
    if busy is not None:
        raise RuntimeUnavailable(
            f"{busy.run}/{busy.stage} is being submitted by another hpc at this moment", hint="`hpc status` shows it"
        )


def _same(plan: Plan, everything: Sequence[tuple[RunDir, Mapping[str, Any]]], code: str) -> RunDir | None:
    """The newest run of mine that asked for the same results: with the same code, or with all of them there."""
    for run, asked in everything:
        same = all(asked["keys"].get(name) == key for name, key in plan.keys.items())
        if same and asked.get("uid") == os.getuid() and (asked.get("code") == code or _all_done(run, plan)):
            return run
    return None


def _all_done(run: RunDir, plan: Plan) -> bool:
    return _finished(plan, run, {n: _result_of(run.stage(n)) for n in plan.keys}, []).keys() == plan.keys.keys()


def _standing(
    run: RunDir, plan: Plan, everything: Sequence[tuple[RunDir, Mapping[str, Any]]], scheduler: Scheduler
) -> dict[str, StageState]:
    asked = next(asked for other, asked in everything if other == run)
    found = {s.stage: s for s in states([(run, asked)], scheduler)}
    if scheduler.problem is not None:
        raise scheduler.problem
    for name, state in found.items():
        job = run.stage(name).job
        known = rundir.read_json(job) or {}
        if state.job_id and "comment" in known and not known.get("job_id"):
            # an earlier `hpc submit` was killed between sbatch and writing the id down
            rundir.write_json(job, {**known, "job_id": state.job_id, "status": "submitted"})
    return {n: s for n, s in found.items() if n in plan.keys and (s.state != NOT_SUBMITTED or s.attempt)}


def _finished(
    plan: Plan, run: RunDir, own: Mapping[str, StageDir], everything: Sequence[tuple[RunDir, Mapping[str, Any]]]
) -> dict[str, StageDir]:
    """Stage -> the folder, its own or another run's, that has its result; or had it, where nothing needs it any more.

    Of a service nothing is kept. What only later stages needed may have been removed to save space.
    """
    found: dict[str, StageDir] = {}
    for planned in reversed([p for p in plan.stages if not p.stage.service]):
        name, key = planned.name, planned.key
        others = (other.stage(name) for other, asked in everything if other != run and asked["keys"].get(name) == key)
        places = [*([own[name]] if name in own else ()), *others]
        folder = next((f for f in places if f.done(key)), None)
        later = [p.name in found for p in plan.stages if name in p.needs]
        if folder is None and later and all(later):
            folder = next((f for f in places if f.made(key)), None)
        if folder is not None:
            found[name] = folder
    return found


def _result_of(folder: StageDir) -> StageDir:
    """The folder that holds a completed stage's result: its own, or the one that it was taken from."""
    job = rundir.read_json(folder.job) or {}
    return RunDir(folder.path.parents[1] / job["reused"]).stage(folder.name) if "reused" in job else folder


def _write_run(work: Submission, settings: Settings) -> None:
    """The run folder up to the first job. A new one appears whole: made aside, then renamed."""
    run = work.run
    with suppress(OSError):  # an unwritable folder is told of below
        RunsDir(run.path.parent).cache.mkdir(parents=True, exist_ok=True)
    if work.is_new:
        git, patch = snapshot.git_state(settings.project.root)
        part = RunDir(run.path.with_name(f".{run.id}.{os.getpid()}.part"))
        try:
            part.path.mkdir(parents=True)
            snapshot.copy(part.code)
            if patch:
                rundir.write_text(part.patch, patch, mode=0o600)  # of files that may have secrets
            rundir.write_json(part.run, _run_document(work, settings, git))
            part.path.rename(run.path)
        except (OSError, ValueError) as error:  # ValueError: a name that UTF-8 can't hold
            shutil.rmtree(part.path, ignore_errors=True)
            if isinstance(error, ValueError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                everything = RunsDir(run.path.parent).runs()
                same = any(r == run and a["uid"] == os.getuid() and a["keys"] == work.plan.keys for r, a in everything)
                kind = RuntimeUnavailable if same else TakenError
                raise kind(
                    f"{run.id} is being submitted by another hpc at this moment", hint="the same command again"
                ) from error
            raise UsageError(
                f"the run folder {run.path} cannot be written: {error.strerror}",
                hint="set `runs` in hpc.toml (or HPC_RUNS) to a folder of yours that the nodes see too",
            ) from error
    for placed in work.placed:
        folder = placed.stage_dir
        if placed.name in work.reused:
            folder.path.mkdir(exist_ok=True)
            reused = work.reused[placed.name].path.parent.name
            rundir.write_json(
                folder.job,
                {"schema": "hpc.job/1", "stage": placed.name, "key": placed.planned.key, "reused": reused},
            )
    for placed in work.todo:
        for path in map(Path, placed.planned.writes):
            if not path.exists():
                path.mkdir(mode=0o700, parents=True)
        placed.stage_dir.path.mkdir(exist_ok=True)
        placed.stage_dir.manifest.unlink(missing_ok=True)  # of a result that is gone: what waits for it looks for this
        rundir.write_json(placed.stage_dir.config, placed.document)


def _run_document(work: Submission, settings: Settings, git: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "schema": "hpc.run/1",
        "run": work.run.id,
        "created": time.time(),
        "uid": os.getuid(),
        "host": socket.gethostname(),
        "command": [argument_without_secrets(word) for word in sys.argv],
        "project": str(settings.project.root),
        "site": settings.site.name,
        "scheduler": settings.site.scheduler,
        "keys": work.plan.keys,
        "code": work.code,
        "git": git,
        "versions": {"hpc": hpc.__version__, "python": sys.version.split()[0]},
    }


def _submit_successors(
    work: Submission, later: Sequence[Placed], before: str | None, scheduler: Scheduler, say: Say
) -> None:
    """Queue them, each to start before the limit of the one before it; at once where there is none."""
    for placed in later:
        record = placed.stage_dir.attempt(placed.attempt).successor
        before = _submit_one(work, placed, succession.dependency(placed, before), scheduler, record)
        say(f"{work.run.id}/{placed.name}: job {before} takes over from it")


def _submit_one(work: Submission, placed: Placed, dependency: str | None, scheduler: Scheduler, record: Path) -> str:
    """Queue one stage; its record says `submitting` before and `submitted` after, so a kill in between is seen."""
    attempt = placed.stage_dir.attempt(placed.attempt)
    try:
        attempt.path.mkdir()
    except FileExistsError:
        raise RuntimeUnavailable(
            f"{work.run.id}/{placed.name} is being submitted by another hpc at this moment",
            hint=f"`hpc status` shows it; where no other hpc is at work, one was killed: remove {attempt.path}",
        ) from None
    document = {
        "schema": "hpc.job/1",
        "stage": placed.name,
        "key": placed.planned.key,
        "attempt": placed.attempt,
        "status": "submitting",
        "scheduler": work.scheduler,
        "job_id": None,
        "comment": placed.comment,
        "submitter": {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())},
        "submitted": time.time(),
        "limit_min": placed.planned.resources.time_min,
        "after": list(placed.planned.needs),
        "python": placed.python,
    }
    try:
        rundir.write_json(record, document)
    except OSError:
        with suppress(OSError):
            attempt.path.rmdir()
        raise
    if work.scheduler == "local":
        job_id = str(batch.submit_local(placed))
    else:
        job_id = batch.submit_slurm(placed, dependency, scheduler.user)
    rundir.write_json(record, {**document, "job_id": job_id, "status": "submitted"})
    return job_id


def _withdraw(work: Submission, submitted: Sequence[Placed], ids: Mapping[str, str], *, keep: bool) -> None:
    """Take back what this call queued: a rejected pipeline leaves nothing behind.

    `keep` the run's folder: a job may be queued after all, and would start without it.
    """
    for placed in submitted:
        rundir.write_json(placed.stage_dir.attempt(placed.attempt).stop, {"by": "hpc submit", "t": time.time()})
    if submitted and work.scheduler == "slurm":
        with suppress(RuntimeUnavailable):
            later = [job for p in submitted for job in succession.withdraw(p.stage_dir)]
            slurm.cancel([*later, *(ids[p.name] for p in submitted)])
    for placed in submitted if work.scheduler == "local" else ():
        batch.stop_local(rundir.read_json(placed.stage_dir.attempt(placed.attempt).process) or {})
    if work.is_new and not submitted and not keep:
        shutil.rmtree(work.run.path, ignore_errors=True)
