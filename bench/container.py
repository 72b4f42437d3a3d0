"""From the first line of a job's batch script to the first line of its stage's `run`, in a container on a node.

Against one `apptainer exec IMAGE python3 -c pass` in the same job, just before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ground import Ground, ground
from measure import Line, Pair, Part

ROUNDS = 15
GOAL = 2.5
_STAGE = '''"""clock: says when it was reached, and how long what it needs takes to start."""

import subprocess
import sys
import time
from dataclasses import dataclass

from hpc.core.stage import Artifact, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class Config:
    number: int = 0


def run(config, ctx):
    now = time.time()
    (output,) = ctx.outputs.values()
    output.write_text("done")
    ctx.metric(reached=now, python=took("pass"), imports=took("import hpc.inside.runner, stages.clock"))


def took(code):
    best = 1e9
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        best = min(best, time.perf_counter() - begin)
    return best


STAGE = Stage(
    name="clock", summary="For a benchmark", config=Config, container="train", consumes={}, run=run,
    outputs=lambda config: {"done": Artifact(kind="dataset", path="done")},
    resources=lambda config: Resources(cpus_per_task=1, mem_gb=1, time_min=5),
)
'''
_SETUP = (
    "noted=$SLURM_SUBMIT_DIR/times-$SLURM_JOB_ID",
    "raw() {{ echo $EPOCHREALTIME; apptainer exec {image} python3 -c pass; echo $EPOCHREALTIME; }}",
    "raw >/dev/null",  # warm
    "raw >$noted",
    "echo $EPOCHREALTIME >>$noted",
)
_PYTHON = """\
#!/bin/bash
echo $EPOCHREALTIME >>$SLURM_SUBMIT_DIR/times-$SLURM_JOB_ID
exec {python} "$@"
"""


def lines(rounds: int) -> Iterator[Line]:
    with ground() as here:
        (stages,) = here.venv.glob("lib/python*/site-packages/stages")
        (stages / "clock.py").write_text(_STAGE)
        python = here.write("python", _PYTHON.format(python=here.python), 0o755)
        here.site(setup=[line.format(image=here.image) for line in _SETUP], python=str(python))
        jobs = [_job(here, number) for number in range(rounds + 1)][1:]
    taken = {name: [job[name] * 1000 for job in jobs] for name in jobs[0]}
    yield Pair(
        what="batch script to the stage's first line",
        ms=taken["whole"],
        against="apptainer exec IMAGE python3 -c pass",
        against_ms=taken["raw"],
        goal=GOAL,
    )
    yield Part(what="srun, until its task starts", ms=taken["srun"])
    yield Part(what="Python and submitit, until our entry", ms=taken["submitit"])
    yield Part(what="the entry, until apptainer is started", ms=taken["enter"])
    yield Part(what="apptainer and Python in the container, until our runner is loaded", ms=taken["container"])
    yield Part(what="of which the imports of the runner and the stage", ms=taken["imports"])
    yield Part(what="the runner, until the stage's first line", ms=taken["runner"])


def _job(here: Ground, number: int) -> dict[str, float]:
    """Seconds of one job's parts."""
    here.run(here.hpc, "submit", "clock", "--wait", "--set", f"clock.number={number}")
    stage = max(here.folder.glob("runs/clock-*/clock"), key=lambda path: path.stat().st_mtime)
    attempt = stage / "attempt-1"
    job = json.loads((stage / "job.json").read_text())["job_id"]
    raw, raw_end, script, task = map(float, (here.folder / f"times-{job}").read_text().split())
    entry, loaded = (_event(attempt / "events.jsonl", phase) for phase in ("starting", "running"))
    started = (attempt / "launch.json").stat().st_mtime
    metrics = json.loads((stage / "manifest.json").read_text())["metrics"]
    return {
        "whole": metrics["reached"] - script,
        "raw": raw_end - raw,
        "srun": task - script,
        "submitit": entry - task,
        "enter": started - entry,
        "container": loaded - started,
        "imports": metrics["imports"] - metrics["python"],
        "runner": metrics["reached"] - loaded,
    }


def _event(file: Path, phase: str) -> float:
    events = map(json.loads, file.read_text().splitlines())
    return next(float(event["t"]) for event in events if event["phase"] == phase)
