"""Jobs about images: each is a run of its own, in no image, which status, logs and cancel know like any other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc.core import config as configs
from hpc.core import limits, rundir
from hpc.core.plan import Environment, Plan, Planned, of_stage
from hpc.core.rundir import RunDir, RunsDir, StageDir
from hpc.core.site import Site
from hpc.core.stage import Resources, Stage
from hpc.login import slurm, snapshot
from hpc.login.place import Placed, batch_parameters, comment_of
from hpc.login.settings import Settings
from hpc.login.states import Scheduler, StageState, states
from hpc.login.submit import Submission, TakenError, submit
from hpc.node.enter import Job
from hpc.node.launch import PASSES, Launch


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job: a Python module that is run on a node."""

    name: str
    module: str
    """Takes the stage's and the attempt's folder as arguments; writes the manifest."""
    config: Mapping[str, Any]
    environment: Environment
    """The image that it is about."""
    resources: Resources
    sbatch: Mapping[str, str | int | bool]
    passes: tuple[str, ...] = ()
    code: str | None = None
    """Where the module is imported from; None: the run's snapshot, which has no hpc.login."""


def send(tasks: Sequence[Task], settings: Settings, say: Callable[[str], None]) -> RunDir:
    """Submit them to Slurm, each as a job of its own."""
    site, runs = settings.site, RunsDir(settings.project.runs)
    run = runs.next(rundir.IMAGES)
    allowed = slurm.partitions()
    placed = tuple(_place(task, run, runs, site, allowed) for task in tasks)
    work = Submission(
        plan=Plan(stages=tuple(p.planned for p in placed)),
        run=run,
        is_new=True,
        code=snapshot.digest(),
        standing={},
        reused={},
        placed=placed,
        site_name=site.name,
        scheduler=site.scheduler,
    )
    try:
        submit(work, settings, Scheduler(), say)
    except TakenError:
        return send(tasks, settings, say)
    return run


def _place(task: Task, run: RunDir, runs: RunsDir, site: Site, allowed: limits.Limits) -> Placed:
    site = of_stage(site, task.sbatch)
    resources = limits.within(task.resources, site, allowed)
    limits.refuse(task.name, resources, site, allowed)
    key = configs.key_of(task.name, task.module, task.config)
    planned = Planned(
        stage=_stage(task, resources), config=task.config, resources=resources, site=site,
        environment=task.environment, sources=(), reads=(), key=key,
    )  # fmt: skip
    stage_dir, python = run.stage(task.name), site.python or sys.executable
    start = Launch(
        kind="venv",  # no image is started
        argv=(python, "-m", task.module, str(stage_dir.path), str(stage_dir.attempt(1).path)),
        env={"PYTHONPATH": task.code or str(run.code), "PYTHONUNBUFFERED": "1"},
        passes=(*PASSES, "PATH", *task.passes),
    )
    limit_s = resources.time_min * 60
    delay_s = min(site.signal_delay_s, limit_s // 4)
    comment = comment_of(run, planned, 1)
    return Placed(
        planned=planned,
        stage_dir=stage_dir,
        attempt=1,
        document={
            "schema": "hpc.config/1", "stage": task.name, "key": key, "config": task.config, "inputs": {},
            "outputs": {}, "environment": asdict(task.environment), "resources": asdict(resources),
            "cache": str(runs.cache),
        },
        job=Job(
            stage_dir=str(stage_dir.path), attempt=1, key=key, launch=start, mem_gb=resources.mem_gb,
            heartbeat_s=site.heartbeat_s, limit_s=limit_s, signal_delay_s=delay_s,
        ),
        batch=batch_parameters(planned, run, delay_s, comment),
        comment=comment,
        python=python,
        code=run.code,
    )  # fmt: skip


def _stage(task: Task, resources: Resources) -> Stage:
    return Stage(
        name=task.name, summary="", config=dict, container=task.environment.name, consumes={},
        outputs=lambda config: {}, resources=lambda config: resources, run=lambda config, context: None,
    )  # fmt: skip


def told(run: RunDir, names: Sequence[str]) -> None:
    """What was submitted, and what to type next."""
    print(f"{run.id}: {', '.join(names)} submitted")
    print(f"next: hpc status {run.id}   hpc logs -f {run.id}   hpc cancel {run.id}")


def standing(run: RunDir) -> list[StageState]:
    """Where the run's jobs stand now."""
    return states([(run, rundir.read_json(run.run) or {"keys": {}})], Scheduler())


def results(stage_dir: StageDir) -> dict[str, Any]:
    """What a job that is done has written."""
    return dict((rundir.read_json(stage_dir.manifest) or {}).get("metrics") or {})
