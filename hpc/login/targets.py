"""RUN, STAGE, RUN/STAGE or nothing on the command line -> the run, the stage and the service that are meant."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpc.core import rundir
from hpc.core import stage as stage_files
from hpc.core.errors import NotFound, UsageError, did_you_mean
from hpc.core.rundir import RunDir, RunsDir

if TYPE_CHECKING:
    from hpc.login.tunnel import Way


def runs() -> RunsDir:
    from hpc.login.settings import locate

    return RunsDir(locate().runs)


def mine() -> list[tuple[RunDir, dict[str, Any]]]:
    return [(run, asked) for run, asked in runs().runs() if asked["uid"] == os.getuid()]


def target(text: str | None) -> tuple[RunDir, str | None]:
    """RUN[/STAGE], /STAGE or STAGE of the latest run, or nothing: the latest run of mine that is not about images."""
    everything = mine()
    if text is None:
        if not everything:
            raise NotFound(f"there are no runs in {runs().path}", hint="`hpc submit pipeline` starts one")
        return next((run for run, _ in everything if not run.of_images), everything[0][0]), None
    return find(text, everything)


def find(text: str, everything: Sequence[tuple[RunDir, Mapping[str, Any]]]) -> tuple[RunDir, str | None]:
    name, _, stage = text.partition("/")
    by_name = {run.id: (run, asked) for run, asked in everything}
    if name not in by_name and not stage and name in stage_files.available():
        latest = next(((r, a) for r, a in everything if name in a["keys"]), None)
        if latest is None:
            raise NotFound(f"no run has a stage '{name}' yet", hint=f"`hpc submit {name}` starts one")
        return latest[0], name
    if name not in by_name:
        if any(run.id == name for run, _ in runs().runs()):
            raise NotFound(f"{name} is another user's run", hint=f"hpc status {name}")
        hint = did_you_mean(name, list(by_name)[:20]) if by_name else "`hpc submit pipeline` starts one"
        raise NotFound(f"there is no run '{name}' in {runs().path}", hint=hint)
    run, asked = by_name[name]
    if stage and stage not in asked["keys"]:
        if stage not in stage_files.available():
            raise UsageError(f"there is no stage '{stage}'", hint=did_you_mean(stage, list(asked["keys"])))
        raise NotFound(f"{run.id} has no stage '{stage}'", hint=f"it has: {', '.join(asked['keys'])}")
    return run, stage or None


def asked(run: RunDir) -> Mapping[str, Any]:
    document = rundir.read_json(run.run)
    if document is None:
        raise NotFound(f"{run.path} is not a run", hint="`hpc status` lists the runs")
    return document


def way(target: str | None, *, models: bool = False) -> Way:
    """The service that is meant, and how its site is reached; with `models`, one that serves a model."""
    from hpc.login import tunnel as tunnels
    from hpc.login.settings import locate, site_profile

    everything = mine()
    run, stage = find(target, everything) if target else (None, None)
    chosen = everything if run is None or target == stage else [(run, asked(run))]  # of a stage alone, any run's
    runs_with_it = [(r, a) for r, a in chosen if stage is None or stage in a["keys"]]
    service = tunnels.choose(runs_with_it, stage, models=models)
    return tunnels.Way(service, site_profile(locate(), service.asked["site"]))
