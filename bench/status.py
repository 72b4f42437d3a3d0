"""`hpc status` with 1, 100 and 2000 jobs in Slurm, against the commands that a person would type for the same.

Run by bob it submits the jobs: status.py submit FIRST LAST, or one that only the accounting knows: status.py forgotten.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ground import STAGES, Ground, ground
from measure import Fact, Line, Pair

ROUNDS = 15
GOAL = 2.0
SIZES = (1, 100, 2000)
EACH = 5
"""Stages of a run, and so jobs."""
_LOGGED = """\
#!/bin/sh
printf '%s\\n' "$0" "$@" END >>{log}
exec /usr/bin/{name} "$@"
"""


def lines(rounds: int) -> Iterator[Line]:
    with ground() as here:
        # held, so that the first waits for its release, and the others for the one before
        here.site(sbatch={"hold": True})
        here.program("status.py", "forgotten")
        there = 0
        for size in SIZES:
            here.program("status.py", "submit", str(there), str(size))
            there = size
            calls = _calls(here)
            typed = "; ".join(shlex.join(call) for call in calls)
            against = f"{typed} >/dev/null; {here.python} -c 'import rich.table'"
            commands = {"hpc": [here.hpc, "status"], "typed": ["sh", "-c", against]}
            for terminal, place in ((False, "in a pipe"), (True, "on a terminal")):
                taken = here.processes(commands, rounds, terminal=terminal)
                yield Pair(
                    what=f"hpc status, {size} job{'s' * (size > 1)}, {place}",
                    ms=taken["hpc"],
                    against="squeue; sacct; import rich.table",
                    against_ms=taken["typed"],
                    goal=GOAL,
                )
            names = [Path(call[0]).name for call in calls]
            found = f"{names.count('squeue')} and {names.count('sacct')}"
            yield Fact(
                what=f"calls of squeue and of sacct, {size} job{'s' * (size > 1)}",
                found=found,
                goal="1 and ≤ 1",
                met=names.count("squeue") == 1 and names.count("sacct") <= 1,
            )


def _calls(here: Ground) -> list[list[str]]:
    """What one `hpc status` calls of squeue and sacct, with their arguments: programs on PATH write them down."""
    log = here.write("calls", "")
    for name in ("squeue", "sacct"):
        here.write(f"logged/{name}", _LOGGED.format(name=name, log=log), 0o755)
    here.run("env", f"PATH={log.parent}/logged:/usr/bin:/bin", here.hpc, "status")
    *calls, _ = log.read_text().split("END\n")
    return [call.replace(f"{log.parent}/logged/", "", 1).splitlines() for call in calls]


def submit(first: int, last: int) -> None:
    """Jobs number `first` to `last` - 1, as runs of several stages."""
    while first < last:
        count = min(EACH, last - first)
        _hpc("submit", "pipeline", "--until", STAGES[count - 1], "--set", f"one.message={first}")
        first += count


def forgotten() -> None:
    """A job whose end only sacct tells: squeue's answer no longer matches what was written down."""
    _hpc("submit", "one", "--set", "one.message=forgotten")
    (file,) = Path("runs").glob("one-*/one/job.json")
    job = json.loads(file.read_text())
    subprocess.run(["scancel", job["job_id"]], check=True)
    file.write_text(json.dumps({**job, "comment": "another"}))


def _hpc(*arguments: str) -> None:
    from hpc.login.cli import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    if code:
        raise SystemExit(f"hpc {shlex.join(arguments)}: exit {code}\n{said.getvalue()}")


if __name__ == "__main__":
    if sys.argv[1] == "submit":
        submit(int(sys.argv[2]), int(sys.argv[3]))
    else:
        forgotten()
    print("null")
