"""`hpc top`: what the GPUs of my running stages do: a table drawn anew until Ctrl-C, one sample, or a document."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from hpc.core.errors import HpcError, RuntimeUnavailable
from hpc.login import view
from hpc.login.samplers import Sampled, Samplers
from hpc.login.states import StageState
from hpc.node.gpus import Gpu

LEAST_S = 0.5
_ASK_S = 10.0
"""Between two questions to Slurm."""
_ANSWER_S = 45.0


def once(running: Sequence[StageState]) -> Samplers:
    """One sample of each."""
    with Samplers(0) as samplers:
        samplers.follow(running)
        samplers.gather(_ANSWER_S)
        return samplers


def live(running: Callable[[], Sequence[StageState]], every_s: float, out: IO[str] = sys.stdout) -> None:
    """A table that is drawn anew with every sample, until Ctrl-C, or until nothing holds a GPU any more."""
    with Samplers(every_s) as samplers, suppress(KeyboardInterrupt):
        asked_at, problem = float("-inf"), None
        while True:
            if time.monotonic() - asked_at > _ASK_S:
                problem, asked_at = None, time.monotonic()
                try:
                    samplers.follow(running())
                except RuntimeUnavailable as error:  # a hiccup of the controller: look again
                    problem = error
            samplers.gather(every_s)
            _draw(samplers, problem, out)
            if not samplers.jobs and problem is None:
                return


def document(samplers: Samplers) -> dict[str, Any]:
    """What `--json` prints."""
    gpus = [{**_place(job, node), **asdict(gpu)} for job, node, gpu in _rows(samplers)]
    problems = [{**_place(j, node), "problem": p} for j in samplers.jobs.values() for node, p in j.problems.items()]
    return {"gpus": gpus, "problems": problems, "left_out": samplers.left_out}


def show(samplers: Samplers, out: IO[str], notes: IO[str]) -> None:
    """The table, and below it a sentence for each job of which there is more to say."""
    rows = [(job.what, job.state.job_id, node, *view.gpu(gpu)) for job, node, gpu in _rows(samplers)]
    if rows:
        view.gpus(rows, out)
        out.flush()
    for job in samplers.jobs.values():
        said = [f"{node}: {problem}" for node, problem in job.problems.items()]
        if warning := job.idle.warning():
            said.append(warning)
        for text in said or ([] if job.nodes else ["no sample yet"]):
            print(f"{job.what} (job {job.state.job_id}): {text}", file=notes)
    if not samplers.jobs:
        print("no running stage of yours holds a GPU; `hpc status` shows what runs", file=notes)
    if samplers.left_out:
        print(f"{samplers.left_out} more jobs are not shown: hpc top RUN", file=notes)


def _rows(samplers: Samplers) -> Iterator[tuple[Sampled, str, Gpu]]:
    for job in samplers.jobs.values():
        for node in sorted(job.nodes):
            yield from ((job, node, gpu) for gpu in job.nodes[node])


def _place(job: Sampled, node: str) -> dict[str, str]:
    return {"run": job.state.run, "stage": job.state.stage, "job_id": job.state.job_id, "node": node}


def _draw(samplers: Samplers, problem: HpcError | None, out: IO[str]) -> None:
    out.write("\033[H\033[2J")
    show(samplers, out, out)
    if problem is not None:
        print(f"{problem.message}; looking again in {_ASK_S:.0f} s", file=out)
    out.flush()
