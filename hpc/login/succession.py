"""Jobs that take over from a service: which, in what place, and waiting until one has. See docs/adr/0025."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from hpc.core import rundir
from hpc.core.errors import HpcError, NotFound, UsageError
from hpc.core.plan import Plan
from hpc.core.rundir import AttemptDir, RunDir, StageDir
from hpc.core.site import Site
from hpc.login.place import Ground, Placed, place
from hpc.login.states import StageState
from hpc.node import outcome

_LOOK_S = 0.5


def refuse(plan: Plan, target: str, standing: Mapping[str, StageState], site: Site) -> None:
    """An HpcError where nothing can be replaced."""
    stage = next((p.stage for p in plan.stages if p.name == target), None)
    if stage is None or not stage.service:
        raise UsageError(f"--replace is for a service, and {target} is none", hint="hpc submit serve --replace")
    if site.scheduler != "slurm":
        raise UsageError("without Slurm there is no second job to take over", hint="hpc cancel, then submit again")
    state = standing.get(target)
    if state is None or state.state != "RUNNING":
        raise NotFound(
            f"no {target} with these settings and this hpc runs, so there is none to replace",
            hint="submit without --replace; `hpc status` shows what runs",
        )


def withdraw(folder: StageDir) -> list[str]:
    """The ids of the jobs that were to take over, and are not wanted any more: the caller cancels them."""
    ids = []
    for attempt in reversed(folder.successors()):
        known = rundir.read_json(attempt.successor) or {}
        rundir.write_json(attempt.stop, {"by": "hpc", "t": time.time()})
        attempt.successor.unlink(missing_ok=True)
        ids += [str(known["job_id"])] if known.get("job_id") else []
    return ids


def next_attempt(folder: StageDir, latest: int) -> int:
    """The number after the latest job's and those of its successors, withdrawn ones too."""
    withdrawn = (AttemptDir(path.parent).number for path in folder.path.glob("attempt-*/cancelled.json"))
    return max([latest, *withdrawn, *(attempt.number for attempt in folder.successors())]) + 1


def placed(
    plan: Plan, ground: Ground, standing: Mapping[str, StageState], replaced: str | None
) -> dict[str, tuple[Placed, ...]]:
    """Service -> its successors, in their places: those that its settings ask for, and one to replace it."""
    found = {}
    for planned in plan.stages:
        name = planned.name
        count, _ = planned.stage.succession(planned.config)
        active = name in standing and standing[name].active
        first = ground.attempts.get(name, 1)
        numbers = range(first, first + 1 + count) if name == replaced else range(first + 1, first + 1 + count)
        if planned.stage.service and ground.site.scheduler == "slurm" and (name == replaced or not active):
            grounds = (
                replace(ground, attempts={**ground.attempts, name: number}, takes_over=True) for number in numbers
            )
            found[name] = tuple(next(p for p in place(plan, g) if p.name == name) for g in grounds)
    return {name: later for name, later in found.items() if later}


def dependency(placed: Placed, before: str | None) -> str | None:
    """Slurm's --dependency: so many minutes after the one before it has started; at once where there is none."""
    if before is None:
        return None
    _, lead_min = placed.planned.stage.succession(placed.planned.config)
    return f"after:{before}+{max(0, placed.planned.resources.time_min - lead_min)}"


def wait(run: RunDir, placed: Placed, say: Callable[[str], None]) -> None:
    """Until this job has taken over. HpcError where it ends before."""
    attempt = placed.stage_dir.attempt(placed.attempt)
    what, told = f"{run.id}/{placed.name}", ""
    while (rundir.read_json(placed.stage_dir.job) or {}).get("attempt", 0) < placed.attempt:
        ended = outcome.read(attempt)
        if ended is not None or not attempt.successor.exists():
            why = f": {ended['state']} {ended.get('cause', '')}".rstrip() if ended else ""
            raise HpcError(f"the job that was to take over {what} has ended{why}", hint=f"see {attempt.path}/stderr")
        events = rundir.last_events(attempt.events)
        phase = events[-1]["phase"] if events else "queued"
        if phase != told:
            told = phase
            say(f"{what}: its successor is {phase}")
        time.sleep(_LOOK_S)
    say(f"{what}: attempt {placed.attempt} has taken over")
