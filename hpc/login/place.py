"""PURE: a plan and a run folder -> for each stage its files, its container start and its batch parameters."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core.feeding import Source
from hpc.core.plan import Environment, Plan, Planned
from hpc.core.rundir import RunDir, StageDir
from hpc.core.site import Site
from hpc.node import launch
from hpc.node.enter import Job
from hpc.node.inplace import InPlace
from hpc.node.staging import Staging, slots_of, target_of


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One stage, ready to be submitted; the dry run prints it and the submission uses it."""

    planned: Planned
    stage_dir: StageDir
    attempt: int
    document: Mapping[str, Any]
    """config.json."""
    job: Job
    batch: Mapping[str, Any]
    """Parameters of submitit's Slurm executor, without the dependency."""
    comment: str
    """Finds the job in Slurm where its id was lost."""
    python: str
    code: Path

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def scheduler_dir(self) -> Path:
        return self.stage_dir.attempt(self.attempt).scheduler


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where a plan is placed."""

    run: RunDir
    site: Site
    attempts: Mapping[str, int]
    """The number of each stage's next submission; 1 where it is missing."""
    finished: Mapping[str, StageDir]
    """The stages that are done already -> the folder that keeps their result."""
    program: str
    """Starts containers."""
    cache: Path
    hub_home: str | None
    """The user's own HF_HOME."""
    scratch: str | None = None
    """The site's scratch folder with its variables filled in."""
    uid: int = 0
    takes_over: bool = False
    """The stages' next jobs, which start while the ones before them serve."""
    links: tuple[str, ...] = ()
    """Folders that the inputs lead to by symbolic links."""


def place(plan: Plan, ground: Ground) -> tuple[Placed, ...]:
    """Every stage of the plan in its place."""
    return tuple(_place(planned, plan, ground) for planned in plan.stages)


def _place(planned: Planned, plan: Plan, ground: Ground) -> Placed:
    run, site = ground.run, ground.site
    attempt = ground.attempts.get(planned.name, 1)
    stage_dir = run.stage(planned.name)
    inputs = {s.name: _input(s, plan, ground) for s in planned.sources}
    document = planned.document(inputs=inputs, out=stage_dir.out, cache=ground.cache)
    if planned.stage.service:
        document["bind"] = _bind(site)
    reads = [*planned.reads, *(i["path"] for i in inputs.values() if i["path"].startswith("/"))]
    if ranks_of(planned) > 1:
        document["ranks"] = ranks_of(planned)
    start = _launch(planned, ground, attempt, reads)
    limit_s = planned.resources.time_min * 60
    delay_s = min(site.signal_delay_s, limit_s // 4)
    comment = comment_of(run, planned, attempt)
    job = Job(
        stage_dir=str(stage_dir.path),
        attempt=attempt,
        key=planned.key,
        launch=start,
        staging=_staging(planned, ground),
        image=_in_place(planned, ground),
        mem_gb=planned.resources.mem_gb,
        heartbeat_s=site.heartbeat_s,
        waits=_waits(planned, plan, ground) if site.scheduler == "local" else (),
        limit_s=limit_s,
        enforce=site.scheduler == "local",
        listen=_bind(site) if _private(planned) else "",
        ports=planned.stage.ports if _private(planned) else (),
        takes_over=ground.takes_over,
        tasks=planned.resources.tasks,
        signal_delay_s=delay_s,
        requeue=site.requeue if site.scheduler == "slurm" else 0,
    )
    return Placed(
        planned=planned,
        stage_dir=stage_dir,
        attempt=attempt,
        document=document,
        job=job,
        batch=batch_parameters(planned, run, delay_s, comment),
        comment=comment,
        python=site.python or sys.executable,
        code=run.code,
    )


def _bind(site: Site) -> str:
    """What a service listens on: the node's loopback, unless the login node comes in over the network."""
    return "0.0.0.0" if site.scheduler == "slurm" and site.reach == "direct" else "127.0.0.1"


def _input(source: Source, plan: Plan, ground: Ground) -> dict[str, Any]:
    if source.stage is None:
        return {"kind": source.kind, "path": source.value, "key": source.key, "stage": None}
    producer = next(p for p in plan.stages if p.name == source.stage)
    artifact = producer.stage.outputs(producer.config)[source.value]
    folder = ground.finished.get(source.stage, ground.run.stage(source.stage))
    return {
        "kind": source.kind,
        "path": str(folder.out / artifact.path),
        "key": source.key,
        "stage": source.stage,
    }


def _waits(planned: Planned, plan: Plan, ground: Ground) -> tuple[tuple[str, str], ...]:
    waiting = [name for name in planned.needs if name not in ground.finished]
    return tuple((str(ground.run.stage(name).path), plan.keys[name]) for name in waiting)


def _staging(planned: Planned, ground: Ground) -> Staging | None:
    image = planned.environment
    if image.kind != "sif" or ground.scratch is None:
        return None
    return staging_of(image, ground.site, ground.scratch, ground.cache, ground.uid)


def staging_of(image: Environment, site: Site, scratch: str, cache: Path, uid: int) -> Staging:
    """How this user's copy of the image comes to a node of the site."""
    return Staging(
        source=image.path,
        sha256=image.digest,
        target=target_of(scratch, image.digest, uid),
        slots=str(slots_of(cache, image.digest)),
        readers=site.stage_readers,
        limit_gb=site.staged_gb,
    )


def _in_place(planned: Planned, ground: Ground) -> InPlace | None:
    image = planned.environment
    if image.kind != "sif" or ground.scratch is not None:
        return None
    return InPlace(path=image.path, sha256=image.digest, stat=image.stat)


def _launch(planned: Planned, ground: Ground, attempt: int, reads: Sequence[str]) -> launch.Launch:
    run, site, cache = ground.run, ground.site, ground.cache
    stage_dir = run.stage(planned.name)
    inner = (
        "python3", "-m", "hpc.inside.ranks" if _ranks(planned) else "hpc.inside.runner", planned.name,
        str(stage_dir.config), str(stage_dir.attempt(attempt).path),
    )  # fmt: skip
    env = {
        "PYTHONPATH": str(run.code),
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        # caches of the libraries stay off $HOME, which is small on most clusters and not seen in the container
        "XDG_CACHE_HOME": str(cache / "xdg"),
        "HF_HOME": ground.hub_home or str(cache / "huggingface"),
        **({"OMP_NUM_THREADS": str(planned.resources.cpus_per_task)} if site.scheduler == "slurm" else {}),
        **site.env,
    }
    passes = (*launch.PASSES, *site.passes)
    if planned.environment.kind == "venv":
        return launch.venv(folder=planned.environment.path, inner=inner, env=env, passes=passes)
    binds = [launch.Bind(str(run.path), writable=True), launch.Bind(str(cache), writable=True)]
    hub = [ground.hub_home] if ground.hub_home else []
    binds += [launch.Bind(path, writable=True) for path in (*hub, *site.binds, *planned.writes)]
    binds += [launch.Bind(path) for path in (*reads, *ground.links) if not path.startswith(f"{run.path}/")]
    return launch.container(
        program=ground.program,
        image=staging.target if (staging := _staging(planned, ground)) else planned.environment.path,
        inner=inner,
        env=env,
        passes=passes,
        binds=binds,
        gpus=planned.resources.gpus_per_node > 0,
        cwd=str(run.path),
        private=_private(planned),
    )


def ranks_of(planned: Planned) -> int:
    """How many tasks Slurm starts of it, as ranks of MPI."""
    asked = planned.resources
    return asked.nodes * asked.tasks_per_node if planned.stage.launcher == "mpi" else 1


def _private(planned: Planned) -> bool:
    """Whether it has an empty network. The ranks of several nodes must reach each other."""
    return planned.stage.private and planned.resources.nodes == 1


def _ranks(planned: Planned) -> bool:
    """It is several processes, which torchrun starts."""
    asked = planned.resources
    return planned.stage.launcher == "torchrun" and asked.nodes * max(1, asked.gpus_per_node) > 1


def batch_parameters(planned: Planned, run: RunDir, delay_s: int, comment: str) -> dict[str, Any]:
    """What submitit is told of the job."""
    asked, site = planned.resources, planned.site
    parameters: dict[str, Any] = {
        "job_name": planned.name,
        "time": asked.time_min,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "cpus_per_task": asked.cpus_per_task,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "comment": comment,
        "signal_delay_s": delay_s,
        "wckey": None,  # submitit would name one, which sites that track them refuse
        # the batch shell outlives a USR2 that is sent to all of the job (scancel -f): the warning is for the stage
        "setup": [
            *site.setup,
            "trap : USR2",
            "unset PYTHONHOME",
            f"export PYTHONPATH={shlex.quote(str(run.code))}",
        ],
        # from 22.05 on srun no longer takes the job's CPUs per task over by itself
        "srun_args": [
            f"--cpus-per-task={asked.cpus_per_task}",
            *([f"--mpi={site.mpi}"] if ranks_of(planned) > 1 else []),
            # where one task is gone, the others would wait for it for ever
            *(["--kill-on-bad-exit=1"] if asked.tasks > 1 else []),
        ],
        # else a job whose input failed would wait for ever
        "additional_parameters": {
            "kill-on-invalid-dep": "yes",
            **({"exclusive": True} if asked.exclusive else {}),
            **{name: value for name, value in site.sbatch.items() if value is not False},
        },
    }
    if site.mem:
        parameters["mem"] = f"{asked.mem_gb}GB"
    if asked.gpus_per_node and site.gpus == "gpus_per_node":
        parameters["gpus_per_node"] = asked.gpus_per_node
    elif asked.gpus_per_node:
        parameters["gres"] = f"{site.gres}:{asked.gpus_per_node}"
    return parameters


def comment_of(run: RunDir, planned: Planned, attempt: int) -> str:
    """Unique among the user's jobs: the run's place is part of it, the number alone is not enough."""
    place = hashlib.sha256(os.fsencode(run.path)).hexdigest()[:8]
    return f"hpc:{run.id}/{planned.name}/{attempt}:{planned.key}:{place}"
