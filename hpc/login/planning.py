"""Options -> settings -> plan -> where it would run: the road that `plan`, `submit` and `--dry-run` share."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

from hpc.core import plan as plans
from hpc.core import stage as stages
from hpc.core.errors import Refused, UsageError, did_you_mean
from hpc.core.rundir import read_json
from hpc.login import batch, slurm, succession, view
from hpc.login import submit as submitting
from hpc.login.facts import MachineFacts
from hpc.login.place import Placed
from hpc.login.settings import Layer, Settings, assignment, load, locate
from hpc.login.states import Scheduler
from hpc.node.launch import argument_without_secrets, process_env, without_secrets


@dataclass(frozen=True, kw_only=True)
class Work:
    """What was asked, decided and placed, but not yet submitted."""

    settings: Settings
    submission: submitting.Submission

    def document(self) -> dict[str, Any]:
        """The plan as JSON values, with each setting's origin."""
        work = self.submission
        return {
            "run": work.run.id,
            "new": work.is_new,
            "site": {**asdict(self.settings.site), "env": without_secrets(self.settings.site.env)},
            "notes": list(work.plan.notes),
            "stages": [
                {
                    "stage": p.name,
                    "key": p.planned.key,
                    "action": self.action(p),
                    "after": list(p.planned.needs),
                    "resources": asdict(p.planned.resources),
                    "environment": asdict(p.planned.environment),
                    "inputs": p.document["inputs"],
                    "outputs": p.document["outputs"],
                    "config": p.document["config"],
                }
                for p in work.placed
            ],
            "origins": {k: argument_without_secrets(v) for k, v in self.settings.origins.items()},
        }

    def action(self, placed: Placed) -> str:
        """In words, what submitting does about this stage."""
        state = self.submission.standing.get(placed.name)
        if placed.name in self.submission.reused:
            return f"done in {self.submission.reused[placed.name].path.parent.name}"
        if state is not None and state.state == "COMPLETED" and placed.name not in self.submission.services:
            return "done"
        if state is not None and state.active and placed not in self.submission.todo:
            return f"{state.state} as job {state.job_id}" + (f" on {state.node}" if state.node else "")
        return "submit" if placed.attempt == 1 else f"submit again (attempt {placed.attempt})"

    def show(self, out: IO[str]) -> None:
        """The plan for a person."""
        work = self.submission
        rows = []
        for p in work.placed:
            asked = p.planned.resources
            rows.append(
                (
                    p.name,
                    self.action(p),
                    ", ".join(p.planned.needs) or "-",
                    str(asked.nodes),
                    str(asked.gpus_per_node),
                    str(asked.cpus_per_task),
                    f"{asked.mem_gb}G",
                    view.clock(asked.time_min * 60),
                    p.planned.environment.path,
                    p.planned.key,
                )
            )
        headings = ("STAGE", "ACTION", "AFTER", "NODES", "GPUS", "CPUS", "MEM", "TIME", "ENVIRONMENT", "KEY")
        if rows:
            print(f"{work.run.id} on site {work.site_name} ({'new run' if work.is_new else 'continued'})", file=out)
            view.table(headings, rows, out)
        for note in work.plan.notes:
            print(f"note: {note}", file=out)
        for name in on_login_node(self.settings, work):
            print(f"note: {name} runs on this login node: only it has a network", file=out)

    def dry_run(self) -> list[dict[str, Any]]:
        """For each stage that would be submitted: the batch script, the container command, binds, environment."""
        work = self.submission
        ids = work.known_ids()
        shown = []
        jobs = [(placed, work.dependency(placed, ids)) for placed in work.todo]
        for name, later in work.successors.items():
            before = f"@{name}" if any(placed.name == name for placed in work.todo) else None
            for placed in later:
                jobs.append((placed, succession.dependency(placed, before)))
                before = f"@{name}/{placed.attempt}"
        for placed, dependency in jobs:
            launch = placed.job.launch
            shown.append(
                {
                    "stage": placed.name,
                    "script": batch.script(placed, dependency) if work.scheduler == "slurm" else None,
                    "after": list(placed.planned.needs),
                    "argv": list(launch.argv),
                    "binds": [asdict(b) for b in launch.binds],
                    "environment": without_secrets(process_env(launch, {})),
                    "passes": list(launch.passes),
                    "config": dict(placed.document),
                }
            )
        return shown

    def show_dry_run(self, out: IO[str]) -> None:
        """The dry run for a person."""
        self.show(out)
        for stage in self.dry_run():
            print(f"\n=== {stage['stage']} ===", file=out)
            if stage["script"] is not None:
                print(f"--- batch script ---\n{stage['script'].rstrip()}", file=out)
            print(f"--- command on the node ---\n{shlex.join(stage['argv'])}", file=out)
            if stage["binds"]:
                print("--- host paths in the container ---", file=out)
                for bind in stage["binds"]:
                    print(f"{'rw' if bind['writable'] else 'ro'} {bind['path']}", file=out)
            print("--- environment ---", file=out)
            for name, value in stage["environment"].items():
                print(f"{name}={value}", file=out)
            print(f"from the job, where set: {' '.join(stage['passes'])}", file=out)

    def show_submitted(self, out: IO[str], *, waited: bool) -> None:
        """What was submitted, what was there already, and what to type next."""
        work = self.submission
        there = [f"{p.name} ({self.action(p)})" for p in work.placed if p not in work.todo]
        if there:
            print(f"{work.run.id}: nothing to do for {', '.join(there)}", file=out)
            seconds, gpu_seconds = work.saved()
            if seconds >= 1:
                print(f"saved: {view.clock(seconds)} of work, {gpu_seconds / 3600:.2f} GPU-hours", file=out)
        if work.todo and not waited:
            print(f"{work.run.id}: {', '.join(p.name for p in work.todo)} submitted", file=out)
            print(
                f"next: hpc status {work.run.id}   hpc logs -f {work.run.id}   hpc cancel {work.run.id}",
                file=out,
            )
        for placed in work.placed:
            if placed.name in work.services and not waited:
                print(f"from a laptop, once it is ready: hpc tunnel {work.run.id}/{placed.name}", file=out)


def make(
    options: argparse.Namespace,
    scheduler: Scheduler,
    say: Callable[[str], None],
    *,
    only: Sequence[str] = (),
    over: Sequence[Layer] = (),
) -> Work:
    """The work that these options ask for; an HpcError where it cannot be done.

    `only`: these stages in place of those asked for; `over`: settings above all others.
    """
    layers = [*flags(options), *over]
    settings = load(locate(), target=options.target, site=options.site, flags=layers)
    if not any("scheduler" in layer.table.get("site", {}) for layer in layers):  # else this machine is meant
        refuse_unheard(settings, named=options.site or os.environ.get("HPC_SITE"))
    wanted = list(only) or _wanted(options, settings)
    facts = MachineFacts(settings, say)
    try:
        plan = plans.plan(settings.wishes, wanted, settings.site, facts)
    finally:
        facts.save()
    asked = getattr(options, "replace", False)
    work = submitting.prepare(plan, settings, only[0] if only else options.target, scheduler, replace=asked)
    if not only:
        _refuse_missing(options.first, wanted, work)
    refuse_other_ranks(work)
    return Work(settings=settings, submission=work)


def submit(work: Work, scheduler: Scheduler, say: Callable[[str], None]) -> Work:
    """Submit it; the work as it was, or in another run where its number was taken for something else meanwhile."""
    while True:
        try:
            submitting.submit(work.submission, work.settings, scheduler, say)
            return work
        except submitting.TakenError:
            work = replace(work, submission=submitting.anew(work.submission, work.settings, scheduler))


def on_login_node(settings: Settings, work: submitting.Submission) -> list[str]:
    """The stages to submit that must run here: they need a network, and the site's nodes have none."""
    if settings.site.scheduler == "local" or settings.site.network == "nodes":
        return []
    return [p.name for p in work.todo if p.planned.stage.network]


def flags(options: argparse.Namespace) -> list[Layer]:
    """What the options of `plan` and `submit` set, over all other settings."""
    layers = [Layer(f"--set {text}", assignment(text)) for text in options.assignments]
    if getattr(options, "auto", False):
        layers.append(Layer("--auto", {"build": {"auto": True}}))
    for name in ("partition", "account", "qos"):
        value = getattr(options, name)
        if value is not None:
            layers.append(Layer(f"--{name}", {"site": {name: value}}))
    if options.time is not None:
        layers.append(
            Layer("--time", {s: {"resources": {"time_min": _minutes(options.time)}} for s in stages.available()})
        )
    return layers


def refuse_unheard(settings: Settings, *, named: str | None) -> None:
    """UsageError where Slurm is told something on a site without it: all would run on this machine, without a word.

    `named`: the site is asked for by name. One that is local by its own words may then run a project that is written
    for a cluster, with its stages' sbatch options.
    """
    site, origins = settings.site, settings.origins
    unheard = [f"site.{name}" for name in ("partition", "account", "qos", "sbatch") if getattr(site, name)]
    if not (named and "site.scheduler" in origins):
        unheard += [f"{w.stage.name}.sbatch" for w in settings.wishes if w.sbatch]
    if site.scheduler == "local" and unheard:
        raise UsageError(
            f"{origins[unheard[0]]}: site '{site.name}' has no Slurm, and {unheard[0]} would do nothing",
            hint='write extends = "slurm" in the site profile, or choose one that has it: --site NAME',
        )


def _minutes(text: str) -> int:
    try:
        value = slurm.minutes(text)
    except ValueError:
        value = None
    if not value:
        raise UsageError(f"--time {text}: not a time", hint="for example 90, 1:30:00 or 2-00:00:00")
    return value


def _wanted(options: argparse.Namespace, settings: Settings) -> list[str]:
    """The stages asked for by name or by --from and --until."""
    order = [w.stage.name for w in settings.wishes]
    if options.target != "pipeline":
        order = [options.target]
    if not order:
        raise UsageError("pipeline.stages names no stage", hint='stages = ["prepare", "finetune"]')
    for bound in (options.first, options.last):
        if bound is not None and bound not in order:
            stages.load(bound)
            raise UsageError(f"'{bound}' is not part of this submission", hint=did_you_mean(bound, order))
    start = order.index(options.first) if options.first else 0
    end = order.index(options.last) + 1 if options.last else len(order)
    if start >= end:
        raise UsageError(f"--from {options.first} comes after --until {options.last}", hint="swap them")
    return order[start:end]


def _refuse_missing(first: str | None, wanted: list[str], work: submitting.Submission) -> None:
    missing = [p.name for p in work.todo if p.name not in wanted]
    if first is not None and missing:
        raise Refused(
            f"--from {first}: {', '.join(missing)} is needed and not done with these settings",
            hint="submit without --from, and it is done first",
        )


def refuse_other_ranks(work: submitting.Submission) -> None:
    """Before a training waits in the queue for GPUs with which it cannot go on from its checkpoints."""
    for placed in work.todo:
        asked, folder = placed.planned.resources, placed.stage_dir
        ranks = asked.nodes * max(1, asked.gpus_per_node)
        before = (read_json(folder.ranks) or {}).get("ranks", ranks)
        if placed.planned.stage.launcher == "torchrun" and before != ranks and any(folder.checkpoints.glob("*-*")):
            raise Refused(
                f"{placed.name} was stopped with {before} ranks, and cannot go on with {ranks}",
                hint=f"set {placed.name}.resources to nodes × gpus_per_node = {before} again, or remove "
                f"{folder.checkpoints} to begin anew",
            )
