"""The ranks of a job that is several tasks of Slurm: the first tells the others what to do, and hears of their ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.errors import HpcError

_LOOK_S = 0.2


@dataclass(frozen=True)
class Meeting:
    """A folder that all ranks see, of one start of the job alone: a requeued job finds the old one."""

    folder: Path
    rank: int
    world: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def tell(self, **words: Any) -> None:
        """The first rank's word to the others, where there are any."""
        if self.world == 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rundir.write_json(self.folder / "told.json", words)

    def told(self, within_s: float) -> Mapping[str, Any]:
        """What the first rank said. HpcError where it says nothing."""
        until = time.monotonic() + within_s
        while (words := rundir.read_json(self.folder / "told.json")) is None:
            if self.is_over():
                raise HpcError(f"rank {self.rank} was not told what to do: the first one has ended")
            if time.monotonic() > until:
                raise HpcError(
                    f"rank {self.rank} heard nothing of the first one within {within_s:g} s",
                    hint="is the run folder seen by all nodes? hpc logs shows the first one's log",
                )
            time.sleep(_LOOK_S)
        return words

    def done(self) -> None:
        """This rank's part is done."""
        (self.folder / f"{self.rank}.done").touch()

    def fail(self, error: HpcError) -> None:
        """Why this rank ends before its time; the first one tells it as the job's reason."""
        words = {"rank": self.rank, "host": os.uname().nodename, "cause": error.message, "hint": error.hint}
        self.folder.mkdir(parents=True, exist_ok=True)
        rundir.write_json(self.folder / f"{self.rank}.failed.json", words)

    def look(self) -> None:
        """HpcError where another rank has failed."""
        for path in sorted(self.folder.glob("*.failed.json")):
            words = rundir.read_json(path)
            if words is not None and words["rank"] != self.rank:
                raise HpcError(f"rank {words['rank']} on {words['host']}: {words['cause']}", hint=words["hint"])

    def wait(self, stopping: Callable[[], bool]) -> None:
        """The first rank waits until the others are done. HpcError where one fails, or the job is to end."""
        others = [self.folder / f"{rank}.done" for rank in range(1, self.world)]
        while not all(path.exists() for path in others):
            self.look()
            if stopping():
                raise HpcError("ended by the scheduler before all ranks were done", hint="ask for more time: --time")
            time.sleep(_LOOK_S)

    def over(self) -> None:
        """The first rank has ended its work: the others may go."""
        if self.world == 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "over").touch()

    def is_over(self) -> bool:
        return (self.folder / "over").exists()

    def until_over(self, within_s: float) -> None:
        """A rank that has failed stays until the first one has told of it: whoever ends first ends all of them."""
        until = time.monotonic() + within_s
        while not self.is_over() and time.monotonic() < until:
            time.sleep(_LOOK_S)


def of(folder: Path, environment: Mapping[str, str]) -> Meeting:
    """That of this process, by the variables that srun sets for each task; alone where there are none."""
    world = int((rundir.read_json(rundir.StageDir(folder).config) or {}).get("ranks", 1))
    if world == 1:
        return Meeting(folder, 0, 1)
    start = f"{environment.get('SLURM_JOB_ID', '0')}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    return Meeting(folder / f"ranks-{start}", rundir.task_number(world), world)
