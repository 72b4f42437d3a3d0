"""What is there, what is missing, what to do. Each check is one function of the settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from hpc import __version__
from hpc.core import plan as plans
from hpc.core.errors import HpcError
from hpc.login import slurm
from hpc.login.facts import MachineFacts, container_program
from hpc.login.planning import refuse_unheard
from hpc.login.settings import Settings, load, locate
from hpc.login.submit import NOT_IN_A_NAME

_LOW_GB = 20
_PTRACE = Path("/proc/sys/kernel/yama/ptrace_scope")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    what: str
    verdict: Literal["ok", "warning", "missing"]
    found: str
    hint: str = ""


def examine(site: str | None = None) -> list[Check]:
    """All checks for the project here."""
    try:
        settings = load(locate(), site=site)
    except HpcError as error:
        return [_python(), Check(what="settings", verdict="missing", found=error.message, hint=error.hint)]
    return [
        _python(),
        _submitit(),
        _settings(settings),
        _runs(settings),
        *_scheduler(settings, site or os.environ.get("HPC_SITE")),
        *_environments(settings),
        *_reach(settings),
    ]


def _python() -> Check:
    return Check(what="hpc", verdict="ok", found=f"{__version__}, Python {sys.version.split()[0]} at {sys.executable}")


def _submitit() -> Check:
    version = metadata.version("submitit")
    fits = version.split(".")[:2] == ["1", "5"]
    return Check(
        what="submitit",
        verdict="ok" if fits else "warning",
        found=version,
        hint="" if fits else "hpc is tested with submitit 1.5",
    )


def _settings(settings: Settings) -> Check:
    file = settings.project.file
    where = str(file) if file else "no hpc.toml here or above: the defaults"
    if not settings.wishes:
        return Check(what="settings", verdict="missing", found=f"{where}; pipeline.stages names no stage")
    return Check(what="settings", verdict="ok", found=f"{where}; site {settings.site.name}")


def _runs(settings: Settings) -> Check:
    folder = settings.project.runs
    there = folder
    while not there.exists():
        there = there.parent
    refused = {
        **{f"has a {word} in its name": letter in str(folder) for letter, word in NOT_IN_A_NAME.items()},
        "is no UTF-8 text": str(folder).encode(errors="ignore").decode() != str(folder),
        "cannot be written": not there.is_dir() or not os.access(there, os.W_OK),
    }
    for why in filter(refused.get, refused):
        return Check(what="runs", verdict="missing", found=f"{folder} {why}", hint="set `runs` or HPC_RUNS")
    free = shutil.disk_usage(there).free / 2**30
    return Check(
        what="runs",
        verdict="ok" if free > _LOW_GB else "warning",
        found=f"{folder}, {free:.0f} GiB free",
        hint="" if free > _LOW_GB else "checkpoints and merged models need room",
    )


def _scheduler(settings: Settings, named: str | None) -> Iterator[Check]:
    site = settings.site
    if site.scheduler == "local":
        yield _asked("scheduler", lambda: _local(settings, named))
        return
    yield _asked("slurm", lambda: slurm.run(["sinfo", "--version"]).strip())
    yield _asked("partitions", lambda: ", ".join(slurm.partitions()))
    accounting = _asked("accounting", _accounting)
    if accounting.verdict == "missing":
        hint = "outcomes come from the run folders instead"
        accounting = replace(accounting, verdict="warning", hint=hint)
    yield accounting


def _local(settings: Settings, named: str | None) -> str:
    refuse_unheard(settings, named=named)
    return "local: stages run on this machine, no Slurm needed"


def _accounting() -> str:
    slurm.run(["sacct", "-n", "-X", "-o", "JobID", "-S", "now"])
    return "answers"


def _environments(settings: Settings) -> Iterator[Check]:
    facts = MachineFacts(settings)
    wishes = plans.settled(settings.wishes, settings.site, facts, None)
    names = dict.fromkeys(w.stage.environment(w.config) for w in wishes if not w.stage.unneeded(w.config))
    kinds = set()
    for name in names:
        try:
            environment = facts.environment(name)
            kinds.add(environment.kind)
            yield Check(what=f"environment {name}", verdict="ok", found=f"{environment.kind} {environment.path}")
        except HpcError as error:
            yield Check(what=f"environment {name}", verdict="missing", found=error.message, hint=error.hint)
    facts.save()
    if "sif" in kinds or settings.site.images:
        yield _asked("apptainer", lambda: _version(container_program(settings.site)))
        yield _tracing()


def _tracing() -> Check:
    """Whether an image's FUSE helper can be kept from the scheduler's signals (docs/adr/0009): here, as a hint."""
    try:
        scope = _PTRACE.read_text().strip()
    except OSError:  # no Yama: nothing is forbidden
        scope = "0"
    if scope in {"0", "1"}:  # 1: a process may trace its children, which is what is done
        return Check(
            what="signals", verdict="ok", found="this machine lets an image's FUSE helper be shielded from them"
        )
    return Check(
        what="signals",
        verdict="warning",
        found=f"kernel.yama.ptrace_scope is {scope} here: where it is so on the nodes, an image's FUSE helper cannot be"
        " shielded, and a stage that is warned of its end may lose its image before it has saved",
        hint="ask the administrators for kernel.yama.ptrace_scope = 1 on the nodes, or a setuid Apptainer,"
        " which needs no helper",
    )


def _reach(settings: Settings) -> Iterator[Check]:
    """Which ways lead to a service on a node, tried with one of the user's that runs."""
    from hpc.core.rundir import RunsDir
    from hpc.login import tunnel, ways

    if settings.site.scheduler == "local":
        return
    mine = [(run, asked) for run, asked in RunsDir(settings.project.runs).runs() if asked["uid"] == os.getuid()]
    wanted = settings.site.reach
    try:
        here = [(run, asked) for run, asked in mine if asked.get("site") == settings.site.name]
        way = tunnel.Way(tunnel.choose(here, None), settings.site)
        found = way.service.announced()
    except HpcError:
        found = None
    if found is None:
        hint = "while a service of yours runs, `hpc doctor` tries direct, jump and relay"
        yield Check(what="reach", verdict="ok", found=f"{wanted}; not tried", hint=hint)
        return
    results = ways.tried(way, *found)
    working = [name for name, answer in results.items() if answer.ok]
    said = "; ".join(f"{name}: {'works' if a.ok else f'no: {a.said}'}" for name, a in results.items())
    fits = wanted in working
    other = f"set reach = '{working[0]}' in the site profile" if working else "see what each of them says"
    hint = "" if fits else f"{other}, and submit the service again"
    yield Check(
        what="reach", verdict="ok" if fits else "warning", found=f"{wanted}, with {way.service.what}: {said}", hint=hint
    )


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    return done.stdout.strip() or f"{program} does not answer"


def _asked(what: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(what=what, verdict="ok", found=ask())
    except HpcError as error:
        return Check(what=what, verdict="missing", found=error.message, hint=error.hint)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(what=what, verdict="missing", found=str(error), hint="")
