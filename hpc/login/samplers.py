"""Samples of the GPUs of running jobs: one step in each job, whose lines are gathered here; who leaves GPUs idle."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.rundir import StageDir
from hpc.login import slurm
from hpc.login.states import StageState
from hpc.node.gpus import Gpu
from hpc.node.launch import FOR_CONTAINER

_MOST = 32
"""Jobs looked at at once: each takes an srun on this machine and a step in Slurm."""
_END_S = 5.0
_IDLE_PERCENT, _IDLE_S = 5.0, 30.0


class Idle:
    """Since when each GPU of one job has been idle, by the samples seen."""

    def __init__(self) -> None:
        self._idle_s: dict[tuple[str, str], float] = {}
        self._since: dict[tuple[str, str], float] = {}

    def see(self, node: str, gpus: Sequence[Gpu], now: float) -> None:
        for gpu in gpus:
            key = (node, gpu.uuid)
            if gpu.utilization is not None and gpu.utilization < _IDLE_PERCENT:
                self._idle_s[key] = now - self._since.setdefault(key, now)
            else:
                self._since.pop(key, None)
                self._idle_s[key] = 0.0

    def warning(self) -> str | None:
        """'holds 4 GPUs, uses 1' where some have been idle long enough to say so."""
        unused = [spent for spent in self._idle_s.values() if spent >= _IDLE_S]
        if not unused:
            return None
        count = len(self._idle_s)
        used = count - len(unused) or "none"
        return f"holds {count} GPU{'s' if count > 1 else ''}, uses {used} (the last {min(unused):.0f} s)"


@dataclass
class Sampled:
    """One running stage, the process that samples its GPUs, and what came of it so far."""

    state: StageState
    process: subprocess.Popen[str]
    nodes: dict[str, list[Gpu]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    idle: Idle = field(default_factory=Idle)
    over: bool = False

    @property
    def what(self) -> str:
        return f"{self.state.run}/{self.state.stage}"

    def take(self, line: str | None) -> None:
        """A line of the sampler; None: it has ended."""
        if line is None:
            self.over = True
            if self.process.wait() or not (self.nodes or self.problems):
                self.nodes.clear()
                self.problems = {self.state.node: _why(self.what, "\n".join(self.said))}
            return
        try:
            sample = json.loads(line)
            node = sample["node"]
        except (ValueError, TypeError, KeyError):
            self.said.append(line.rstrip())
            return
        self.nodes.pop(node, None)
        self.problems.pop(node, None)
        if "problem" in sample:
            self.problems[node] = sample["problem"]
            return
        self.nodes[node] = [Gpu(**values) for values in sample["gpus"]]
        self.idle.see(node, self.nodes[node], time.monotonic())


def _why(what: str, words: str) -> str:
    return slurm.step_failure(what, words).message.removeprefix(f"{what}: ") if words else "gave no sample"


class Samplers:
    """The jobs that are looked at. Leaving the block ends all that was started for it."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._lines: queue.SimpleQueue[tuple[Sampled, str | None]] = queue.SimpleQueue()
        self.jobs: dict[tuple[str, str, str], Sampled] = {}
        self.left_out = 0
        """Jobs that are not looked at, because there are too many."""

    def __enter__(self) -> Samplers:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(list(self.jobs.values()))

    def follow(self, running: Sequence[StageState]) -> None:
        """Look at these from now on: start what is new, end what is no longer among them."""
        chosen = {(s.run, s.stage, s.job_id): s for s in running if _holds_gpus(s)}
        self.left_out = max(0, len(chosen) - _MOST)
        chosen = dict(list(chosen.items())[:_MOST])
        self._end([self.jobs.pop(key) for key in self.jobs.keys() - chosen.keys()])
        for key in chosen.keys() - self.jobs.keys():
            job = self.jobs[key] = Sampled(chosen[key], _start(chosen[key], self._every_s))
            threading.Thread(target=self._read, args=(job,), daemon=True).start()
        self.jobs = {key: self.jobs[key] for key in chosen}

    def gather(self, seconds: float) -> None:
        """Take samples for so long, or until no more will come."""
        until = time.monotonic() + seconds
        while not all(job.over for job in self.jobs.values()):
            try:
                job, line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            job.take(line)

    def _read(self, job: Sampled) -> None:
        assert job.process.stdout is not None
        with job.process.stdout as lines:
            for line in lines:
                self._lines.put((job, line))
        self._lines.put((job, None))

    def _end(self, jobs: Sequence[Sampled]) -> None:
        """Their standard input closed, the samplers on the nodes end; srun itself where that takes too long."""
        for job in jobs:
            with suppress(OSError):
                job.process.stdin.close()  # type: ignore[union-attr]
        deadline = time.monotonic() + _END_S
        for job in jobs:
            try:
                job.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.terminate()


def _resources(state: StageState) -> dict[str, Any]:
    config = rundir.read_json(StageDir(Path(state.folder)).config) or {}
    return dict(config.get("resources", {}))


def _holds_gpus(state: StageState) -> bool:
    return bool(_resources(state).get("gpus_per_node"))


def _start(state: StageState, every_s: float) -> subprocess.Popen[str]:
    folder = StageDir(Path(state.folder))
    python = (rundir.read_json(folder.job) or {}).get("python") or sys.executable
    argv = [python, "-m", "hpc.node.gpus", str(every_s)]
    env = {**slurm.step_env(os.environ), "PYTHONPATH": str(folder.path.parent / "code")}
    if state.scheduler == "slurm":
        argv = slurm.step(state.job_id, argv, nodes=_resources(state).get("nodes", 1))
    else:
        job = (rundir.read_json(folder.attempt(state.attempt).launch) or {}).get("env", {})
        name = "CUDA_VISIBLE_DEVICES"
        visible = job.get(name, job.get(FOR_CONTAINER + name))
        env.update({name: visible} if visible is not None else {})
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            argv, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
            start_new_session=True,  # Ctrl-C is ours to act on
        )  # fmt: skip
    except FileNotFoundError:
        raise slurm.missing(argv[0]) from None
