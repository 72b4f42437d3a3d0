"""Six dependent stages by `hpc submit`, against six `sbatch` in a row with the same scripts, and submitit's own loop.

Run by bob it submits: submit.py hpc NUMBER, submit.py sbatch FOLDER, submit.py submitit FOLDER; it prints the seconds.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ground import STAGES, ground
from measure import Line, Pair, Part

ROUNDS = 9
GOAL = 2.0


def lines(rounds: int) -> Iterator[Line]:
    taken: dict[str, list[float]] = {}
    with ground() as here:
        here.site(sbatch={"hold": True})
        for number in range(rounds + 1):  # the one before the first round fills the file cache
            by_hpc = here.program("submit.py", "hpc", str(number))
            runs = here.folder / "runs" / by_hpc.pop("run")
            by_hand = here.program("submit.py", "sbatch", str(runs))
            by_loop = here.program("submit.py", "submitit", str(here.folder / "loop" / str(number)))
            here.cancel()
            for name, seconds in {**by_hpc, "sbatch": by_hand, "submitit": by_loop}.items():
                if number:
                    taken.setdefault(name, []).append(seconds * 1000)
    raw, raw_ms = "6 sbatch, the same scripts", taken["sbatch"]
    yield Pair(what="hpc submit, 6 stages: the jobs", ms=taken["jobs"], against=raw, against_ms=raw_ms, goal=GOAL)
    yield Part(what="before them, once: settings and plan, with one sinfo", ms=taken["plan"])
    yield Part(what="import of submitit", ms=taken["imports"])
    yield Part(what="run folder with the code's snapshot", ms=taken["snapshot"])
    yield Pair(what="submitit's own loop, 6 jobs", ms=taken["submitit"], against=raw, against_ms=raw_ms)


def by_hpc(number: int) -> dict[str, Any]:
    """`hpc submit pipeline`, with its parts' times."""
    begin = time.perf_counter()
    from hpc.login.cli import parser
    from hpc.login.planning import make
    from hpc.login.states import Scheduler
    from hpc.login.submit import submit

    def say(text: str) -> None:
        pass

    scheduler = Scheduler()
    options = parser().parse_args(["submit", "pipeline", "--set", f"one.message={number}"])
    work = make(options, scheduler, say)
    planned = time.perf_counter() - begin
    timings = dataclasses.asdict(submit(work.submission, work.settings, scheduler, say))
    assert timings.pop("submitted") == [*STAGES]
    return {"run": work.submission.run.id, "plan": planned, **timings}


def by_hand(run: Path) -> float:
    """The scripts of a run once more, each after the new job that stands for the old one."""
    taken = 0.0
    ids: dict[str, str] = {}
    """Job of the run -> its new one."""
    for stage in STAGES:
        earlier = json.loads((run / stage / "job.json").read_text())["job_id"]
        script = run / stage / "attempt-1" / "scheduler" / f"{earlier}_submission.sh"
        again = script.with_name("again.sh")
        again.write_text(re.sub(r"(?<=afterok:)\d+", lambda found: ids[found[0]], script.read_text()))
        begin = time.perf_counter()
        done = subprocess.run(["sbatch", "--parsable", again], check=True, capture_output=True, text=True)
        taken += time.perf_counter() - begin
        ids[earlier] = done.stdout.strip()
    return taken


def by_loop(folder: Path) -> float:
    """Six jobs, each after the one before, as submitit's documentation shows it."""
    import submitit

    begin = time.perf_counter()
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    executor.update_parameters(timeout_min=5, mem_gb=1, slurm_partition="batch", slurm_account="research",
                               slurm_additional_parameters={"hold": True})  # fmt: skip
    for number in range(len(STAGES)):
        job = executor.submit(time.sleep, number)
        executor.update_parameters(slurm_dependency=f"afterok:{job.job_id}")
    return time.perf_counter() - begin


if __name__ == "__main__":
    if sys.argv[1] == "hpc":
        print(json.dumps(by_hpc(int(sys.argv[2]))))
    else:
        print((by_hand if sys.argv[1] == "sbatch" else by_loop)(Path(sys.argv[2])))
