"""What a partition allows, and the refusal of what it does not: Slurm would let such a job pend for ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpc.core.errors import Refused, UsageError, did_you_mean
from hpc.core.site import Site
from hpc.core.stage import Resources, Stage


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes of one make in one partition."""

    count: int
    cpus: int
    mem_gb: int
    gpus: Mapping[str, int]
    """GPU type ('' where the site gives none) -> GPUs of a node."""

    @property
    def gpu_total(self) -> int:
        return sum(self.gpus.values())


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One partition as sinfo shows it."""

    name: str
    default: bool
    up: bool
    time_min: int | None
    """Its time limit in minutes; None: no limit."""
    nodes: tuple[NodeKind, ...]


Limits = Mapping[str, Partition]


def fit(stage: Stage, asked: Resources, site: Site, limits: Limits | None) -> tuple[Resources, list[str]]:
    """The resources that the site can be asked for, with what was changed; Refused where they can't be had."""
    if site.gpus == "none" and asked.gpus_per_node:
        note = f"{stage.name}: site '{site.name}' gives no GPUs, it runs on the CPU"
        asked, notes = replace(asked, gpus_per_node=0), [note]
    else:
        notes = []
    if asked.nodes < 1 or asked.cpus_per_task < 1 or asked.mem_gb < 1 or asked.time_min < 1 or asked.gpus_per_node < 0:
        raise UsageError(f"{stage.name}: resources must be positive, not {asked}", hint="see `resources` in hpc.toml")
    if site.scheduler == "local" and asked.nodes > 1:
        raise Refused(
            f"{stage.name} asks for {asked.nodes} nodes, but site '{site.name}' is this machine alone",
            hint="choose a Slurm site with --site, or nodes = 1",
        )
    alone = stage.launcher not in ("torchrun", "mpi") and asked.nodes > 1
    if alone or (stage.launcher == "python" and asked.gpus_per_node > 1):
        raise Refused(
            f"{stage.name} is one process: it cannot use {asked.gpus} GPUs on {asked.nodes} node(s)",
            hint=f"set {stage.name}.resources to nodes = 1"
            + (" and gpus_per_node = 1" if stage.launcher == "python" else ""),
        )
    if limits is not None:
        refuse(stage.name, asked, site, limits)
    return asked, notes


def refuse(stage: str, asked: Resources, site: Site, limits: Limits) -> None:
    """Refused, with the reason and what would work, where the partition cannot give what is asked."""
    partition = partition_of(site, limits)
    if partition is None:
        return
    where = f"partition '{partition.name}'"
    if not partition.up:
        raise Refused(f"{where} is down", hint=did_you_mean(partition.name, _others(partition, limits)))
    if partition.time_min is not None and asked.time_min > partition.time_min:
        raise Refused(
            f"{stage} asks for {asked.time_min} min, but {where} allows {partition.time_min} min;"
            " Slurm would let it wait for ever",
            hint=f"--time {partition.time_min} or less, or another --partition{_longer(asked, limits)}",
        )
    gpu_type = _gpu_type(site)
    fitting = [n for n in partition.nodes if _fits(n, asked, site, gpu_type)]
    if sum(n.count for n in fitting) >= asked.nodes:
        return
    raise Refused(
        f"{stage} asks for {_words(asked, site, gpu_type)}, and {where} has no such node"
        if not fitting
        else f"{stage} asks for {asked.nodes} nodes, and {where} has {sum(n.count for n in fitting)} that fit",
        hint=f"{where} has: {'; '.join(_describe(n) for n in partition.nodes) or 'no nodes'}",
    )


def partition_of(site: Site, limits: Limits) -> Partition | None:
    """The partition that jobs of this site go to, None where none is known; Refused where there is no such one."""
    if site.partition is None:
        return next((p for p in limits.values() if p.default), None)
    if site.partition not in limits:
        raise Refused(
            f"this cluster has no partition '{site.partition}'",
            hint=did_you_mean(site.partition, list(limits)),
        )
    return limits[site.partition]


def _gpu_type(site: Site) -> str:
    return site.gres.partition(":")[2] if site.gpus == "gres" else ""


def _fits(node: NodeKind, asked: Resources, site: Site, gpu_type: str) -> bool:
    gpus = node.gpus.get(gpu_type, 0) if gpu_type else node.gpu_total
    return (
        asked.cpus_per_task * asked.tasks_per_node <= node.cpus
        and (not site.mem or asked.mem_gb <= node.mem_gb)
        and (site.gpus == "none" or asked.gpus_per_node <= gpus)
    )


def _words(asked: Resources, site: Site, gpu_type: str) -> str:
    parts = [f"{asked.cpus_per_task * asked.tasks_per_node} CPUs"]
    if site.mem:
        parts.append(f"{asked.mem_gb} GiB")
    if asked.gpus_per_node:
        parts.append(f"{asked.gpus_per_node} GPUs{f' of type {gpu_type}' if gpu_type else ''}")
    return ", ".join(parts) + " on a node"


def _describe(node: NodeKind) -> str:
    gpus = ", ".join(f"{n} GPUs{f' ({t})' if t else ''}" for t, n in node.gpus.items()) or "no GPUs"
    return f"{node.count} nodes with {node.cpus} CPUs, {node.mem_gb} GiB, {gpus}"


def _others(partition: Partition, limits: Limits) -> list[str]:
    return [p.name for p in limits.values() if p.up and p.name != partition.name]


def _longer(asked: Resources, limits: Limits) -> str:
    names = [p.name for p in limits.values() if p.up and (p.time_min is None or p.time_min >= asked.time_min)]
    return f" ({', '.join(names)})" if names else ""


def within(asked: Resources, site: Site, limits: Limits) -> Resources:
    """The same, or less where the partition's largest node or its time limit is smaller."""
    partition = partition_of(site, limits)
    if partition is None or not partition.nodes:
        return asked
    return replace(
        asked,
        cpus_per_task=min(asked.cpus_per_task, max(n.cpus for n in partition.nodes)),
        mem_gb=min(asked.mem_gb, max(n.mem_gb for n in partition.nodes)),
        time_min=min(asked.time_min, partition.time_min or asked.time_min),
    )
