"""What hinders a fresh start: a stage's job, and what a service that is gone has left. Data and results stay."""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core.errors import HpcError, UsageError
from hpc.core.rundir import RunDir, StageDir, read_json, write_text
from hpc.login import view
from hpc.login.cancel import cancel
from hpc.login.states import Scheduler, StageState, states
from hpc.node.staging import again, slots_of

_WAIT_S = 120
"""Slurm kills a job that does not end within its KillWait (30 s by default)."""
_LOOK_S = 0.5

Runs = Sequence[tuple[RunDir, Mapping[str, Any]]]


@dataclass(frozen=True)
class Leftovers:
    """What a reset takes away; false where there is nothing."""

    run: RunDir
    jobs: Sequence[StageState]
    files: Sequence[Path]
    images: Mapping[Path, str]
    """Where the nodes are told to copy an image anew -> its name."""

    def __bool__(self) -> bool:
        return bool(self.jobs or self.files or self.images)

    def words(self) -> list[str]:
        """In words, before it is done."""
        lines = []
        for s in self.jobs:
            where = ", ".join(filter(None, (s.state, s.node, view.clock(s.elapsed_s) if s.elapsed_s else "")))
            lines.append(f"{s.run}/{s.stage}: job {s.job_id} is cancelled ({where})")
        lines += [f"{path} is removed" for path in self.files]
        return [*lines, *(f"the image {name} is copied to its node anew" for name in self.images.values())]


def run(runs: Runs, stage: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """The whole of `hpc reset` for the first of the runs that has something to reset: what was done, hpc.reset/1."""
    scheduler = Scheduler()
    rows = [s for s in states(runs, scheduler) if stage in (None, s.stage)]
    if scheduler.problem is not None:
        raise scheduler.problem
    every = [_look(one, [s for s in rows if s.run == one.id]) for one, _ in runs]
    left = next(filter(None, every), every[0])
    name = f"{left.run.id}/{stage}" if stage else left.run.id
    for line in left.words():
        print(line, file=sys.stderr)
    removed: list[Path] = []
    if not left:
        said = "nothing to reset"
    elif not (options.yes or _agreed(options)):
        said = "nothing was changed"
    else:
        removed = _reset(left, next(asked for one, asked in runs if one == left.run))
        said = "reset; `hpc submit` starts it again"
    if not options.json:
        print(f"{name}: {said}")
    cancelled = [{"stage": s.stage, "job_id": s.job_id} for s in left.jobs]
    images = sorted(set(left.images.values())) if said.startswith("reset") else []
    return {"run": left.run.id, "cancelled": cancelled, "removed": list(map(str, removed)), "images": images}


def _look(run: RunDir, rows: Sequence[StageState]) -> Leftovers:
    files = [path for s in rows if not s.active for path in _left(run.stage(s.stage))]
    images = dict(filter(None, (_staged(run.stage(s.stage)) for s in rows)))
    return Leftovers(run, [s for s in rows if s.active], files, images)


def _staged(folder: StageDir) -> tuple[Path, str] | None:
    """Where to ask for a new copy of the stage's image, and its name; None where it had none since this was asked."""
    document = read_json(folder.config) or {}
    image = document.get("environment", {})
    last = max(folder.path.glob("attempt-*/launch.json"), key=lambda path: path.stat().st_mtime, default=None)
    if image.get("kind") != "sif" or last is None:
        return None
    argv = (read_json(last) or {}).get("argv", [])
    if not any(str(word).endswith(f"/{image['digest']}.sif") for word in argv):
        return None  # it was started from where it lies
    asked = again(slots_of(Path(document["cache"]), image["digest"]))
    if asked.exists() and asked.stat().st_mtime >= last.stat().st_mtime:
        return None
    return asked, image["name"]


def _agreed(options: argparse.Namespace) -> bool:
    if options.json or not sys.stdin.isatty():
        raise UsageError("a reset asks first, and here is nobody to answer", hint=f"hpc reset {options.target} --yes")
    try:
        answer = input("Data, models, notebooks, checkpoints and results stay. Reset? [y/N] ")
    except EOFError:
        print()
        return False
    return answer.strip().lower() in {"y", "yes"}


def _reset(left: Leftovers, asked: Mapping[str, Any]) -> list[Path]:
    """Cancel, wait for the end, clear away; the files that were removed. HpcError where a job does not end."""
    cancel(left.run, left.jobs)
    names = [s.stage for s in left.jobs]
    _wait(left.run, names, asked)
    removed = [*left.files, *(path for name in names for path in _left(left.run.stage(name)))]
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in left.images:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(8))
    return removed


def _left(folder: StageDir) -> list[Path]:
    """A service's announcement, and what was being written when its writer was killed."""
    announced = [path for path in (folder.endpoint, folder.token) if path.exists()]
    return [*announced, *sorted([*folder.path.glob("*.part"), *folder.out.glob(".*.part")])]


def _wait(run: RunDir, names: Sequence[str], asked: Mapping[str, Any]) -> None:
    deadline, told = time.monotonic() + _WAIT_S, False
    while names:
        scheduler = Scheduler()
        still = [s for s in states([(run, asked)], scheduler) if s.stage in names and s.active]
        if scheduler.problem is not None:
            raise scheduler.problem
        if not still:
            return
        jobs = ", ".join(s.job_id for s in still)
        if time.monotonic() > deadline:
            raise HpcError(
                f"job {jobs} has been cancelled, and has not ended after {_WAIT_S} s",
                hint="its node may be down: the same command again later",
            )
        if not told:
            print(f"waiting for job {jobs} to end", file=sys.stderr)
            told = True
        time.sleep(_LOOK_S)
