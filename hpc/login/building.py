"""`hpc images build --submit`: the same build in a job on a compute node; and that job's payload.

python3 -m hpc.login.building STAGE_DIR ATTEMPT_DIR
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.assets import PACKAGES
from hpc.core.errors import Interrupted, UsageError
from hpc.core.plan import Environment
from hpc.core.rundir import AttemptDir, RunDir
from hpc.core.stage import Resources
from hpc.login import follow, imagejobs
from hpc.login.settings import Settings
from hpc.login.states import UNKNOWN
from hpc.node import payload

_NEEDS = Resources(cpus_per_task=8, mem_gb=16, time_min=240)
_PASSES = ("HPC_*", "XDG_*", "PIP_*", "LD_LIBRARY_PATH")
"""Where `hpc` finds its settings, pip its index, and a module its program. Not APPTAINER_TMPDIR, nor its cache:
those name the login node's disks."""


def submit(options: argparse.Namespace, settings: Settings, image: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Queue the build, and with --wait relay what it says; the document, with the exit code."""
    if settings.site.scheduler == "local":
        raise UsageError(f"the site '{settings.site.name}' has no compute nodes", hint="leave --submit out")
    name = f"build-{options.name}"
    task = imagejobs.Task(
        name=name,
        module="hpc.login.building",
        config={"argv": _argv(options), "cwd": os.getcwd()},
        environment=Environment(name=options.name, kind=options.kind, path=str(image), digest=""),
        resources=_NEEDS,
        sbatch={"partition": options.partition} if options.partition else {},
        passes=_PASSES,
        code=str(PACKAGES),
    )
    run = imagejobs.send([task], settings, say)
    code = _relay(run, name) if options.wait else 0
    (state,) = imagejobs.standing(run)
    if code == 1 and state.exit_code:
        code = state.exit_code
    if not options.wait and not options.json:
        imagejobs.told(run, [name])
    made = imagejobs.results(run.stage(name)) or {"name": options.name, "kind": options.kind, "path": str(image)}
    return {**made, "run": run.id, "job_id": state.job_id, "state": state.state, "exit_code": code}


def _argv(options: argparse.Namespace) -> list[str]:
    """The same command without --submit."""
    words = ["images", "build", options.name, "--as", options.kind]
    for name in ("site", "to", "tmp"):
        value = getattr(options, name)
        words += [f"--{name}={value}"] if value else []
    return [*words, *(f"--build-arg={text}" for text in options.build_arg), *(["--force"] if options.force else [])]


def _relay(run: RunDir, name: str) -> int:
    """What the build says, as it says it, until it has ended; `follow.wait`'s exit code."""
    shown = f"{run.id}/{name} PENDING"  # what everybody expects is not told

    def active() -> bool:
        nonlocal shown
        (state,) = imagejobs.standing(run)
        line = f"{run.id}/{name} {state.state} {state.reason}".rstrip()
        if line != shown:
            shown = line
            print(line, file=sys.stderr, flush=True)
        return state.active or state.state == UNKNOWN

    try:
        active()
        follow.logs(run.stage(name).attempt(1), sys.stderr, lines=None, follow=True, active=active)
        code = follow.wait(run, [name], io.StringIO())  # what it would show was shown
    except KeyboardInterrupt:
        raise Interrupted(
            f"no longer waiting; {run.id} goes on",
            hint=f"hpc logs -f {run.id}, or hpc cancel {run.id} to end it",
        ) from None
    active()
    return code


def _build(document: Mapping[str, Any], attempt: AttemptDir) -> Mapping[str, Any]:
    """On the compute node."""
    from hpc.login import cli, images, making
    from hpc.login.facts import expand
    from hpc.login.settings import load, locate

    os.environ.pop("PYTHONPATH", None)  # pip would take it for its own
    signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(128 + number))  # the time limit: clear away, and end

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        rundir.append_event(attempt.events, "building", message=text.strip())

    os.chdir(document["config"]["cwd"])
    options = cli.parser().parse_args(document["config"]["argv"])
    settings = load(locate(), site=options.site)
    if settings.site.scratch:
        with suppress(OSError):  # a user's own folder there may not be made yet
            Path(expand(settings.site.scratch)).mkdir(parents=True, exist_ok=True)
    say(f"{options.name}: on {os.uname().nodename}, working in {making.scratch(options.tmp, settings)}")
    return images.build(options, settings, say)


if __name__ == "__main__":
    raise SystemExit(payload.run(sys.argv[1:], _build))
