"""`hpc images stage`: images to the nodes' own disks ahead of time, one small job for each node."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from hpc.core import limits
from hpc.core.errors import Refused, UsageError, VerificationFailed
from hpc.core.plan import Environment
from hpc.core.rundir import RunDir, RunsDir
from hpc.core.site import Site
from hpc.core.stage import Resources
from hpc.login import follow, imagejobs, slurm
from hpc.login.facts import MachineFacts, expand
from hpc.login.place import staging_of
from hpc.login.settings import Settings
from hpc.node.prefetch import Fetched, fetch
from hpc.node.staging import Staging, in_words

Say = Callable[[str], None]
_NEEDS = Resources(cpus_per_task=2, mem_gb=2, time_min=60)
_TELL_S = 2.0


def stage(options: argparse.Namespace, settings: Settings, say: Say) -> Mapping[str, Any]:
    """The document of what was staged, or submitted; its exit code is in it."""
    site = settings.site
    if not site.scratch:
        raise UsageError(
            f"the site '{site.name}' has no `scratch`: images run from where they lie, there is nothing to stage",
            hint="scratch = '/a/folder/on/each/nodes/own/disk' in its profile",
        )
    images = _images(options.names, settings, say)
    cache = RunsDir(settings.project.runs).cache
    wishes = {i.name: staging_of(i, site, expand(site.scratch), cache, os.getuid()) for i in images}
    if site.scheduler == "local":
        if options.nodes or options.partition:
            raise UsageError(f"the site '{site.name}' is this machine alone", hint="--nodes and --partition need Slurm")
        return _here(wishes, options, say)
    nodes = _nodes(options, site)
    tasks = [
        imagejobs.Task(
            name=node,
            module="hpc.node.prefetch",
            config={"images": {name: asdict(wish) for name, wish in wishes.items()}},
            environment=images[0],
            resources=_NEEDS,
            sbatch={"nodelist": node, **({"partition": options.partition} if options.partition else {})},
        )
        for node in nodes
    ]
    run = imagejobs.send(tasks, settings, (lambda text: None) if options.wait or options.json else say)
    code = follow.wait(run, nodes, sys.stderr) if options.wait else 0
    rows = _rows(run)
    if any(row["exit_code"] == VerificationFailed.exit_code for row in rows):
        code = VerificationFailed.exit_code
    if not options.json and options.wait:
        for row in rows:
            print("\n".join(_words(row)))
    elif not options.json:
        imagejobs.told(run, nodes)
    return {"run": run.id, "folder": str(run.path), "nodes": rows, "exit_code": code}


def _images(names: list[str], settings: Settings, say: Say) -> list[Environment]:
    facts = MachineFacts(settings, say)
    try:
        found = [facts.environment(name) for name in dict.fromkeys(names)]
    finally:
        facts.save()
    for one in found:
        if one.kind != "sif":
            raise UsageError(f"'{one.name}' is a venv, {one.path}: only images are staged", hint="hpc images list")
    return found


def _here(wishes: Mapping[str, Staging], options: argparse.Namespace, say: Say) -> Mapping[str, Any]:
    """Stage on this machine."""
    told = time.monotonic()

    def tell(done: int, total: int, rate: float) -> None:
        nonlocal told
        if time.monotonic() - told >= _TELL_S or not done:
            told = time.monotonic()
            share = f" {done / total:.0%}" if total else ""
            say(f"  staging{share}  {in_words('the image', total, rate)}")

    found = {name: fetch(wish, tell) for name, wish in wishes.items()}
    host = os.uname().nodename
    row = _row(host, images={name: asdict(one) for name, one in found.items()}, state="COMPLETED")
    if not options.json:
        print("\n".join(_words(row)))
    return {"nodes": [row], "exit_code": 0}


def _nodes(options: argparse.Namespace, site: Site) -> list[str]:
    """The nodes that were named, else those of the partition that are up; Refused where one of them is not."""
    partition = options.partition or site.partition
    limits.partition_of(replace(site, partition=partition), slurm.partitions())
    named = slurm.hostnames(options.nodes) if options.nodes else []
    found = {node.name: node for node in slurm.nodes(partition, named)}
    where = f"partition '{partition}'" if partition else "the default partition"
    for name in named:
        if name not in found:
            raise UsageError(f"{where} has no node '{name}'", hint="`sinfo -N` lists them; --partition names another")
        if not found[name].up:
            raise Refused(f"{name} is {found[name].state}", hint="leave it out, or wait until it is back")
    up = [node.name for node in found.values() if node.up]
    if not up:
        raise Refused(f"{where} has no node that is up", hint="`sinfo` shows their states; --partition names another")
    return named or up


def _rows(run: RunDir) -> list[dict[str, Any]]:
    return [
        _row(s.stage, imagejobs.results(run.stage(s.stage)), s.state, s.job_id, s.reason, s.exit_code)
        for s in imagejobs.standing(run)
    ]


def _row(
    node: str, images: Mapping[str, Any], state: str, job_id: str = "", reason: str = "", exit_code: int | None = None
) -> dict[str, Any]:
    return {"node": node, "job_id": job_id, "state": state, "reason": reason, "exit_code": exit_code, "images": images}


def _words(row: Mapping[str, Any]) -> list[str]:
    """A line for each image that is on the node, or why none is."""
    if row["state"] != "COMPLETED":
        return [f"{row['node']}: {row['state']}: {row['reason'] or 'no reason known'}"]
    return [f"{row['node']}: {name} {Fetched(**one)}" for name, one in row["images"].items()]
