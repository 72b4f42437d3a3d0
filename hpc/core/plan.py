"""PURE: stages + configs + site + facts -> the DAG with keys, resources and refusals. Reads and changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hpc.core import config as configs
from hpc.core.errors import Refused, UsageError
from hpc.core.limits import Limits, refuse
from hpc.core.site import Site
from hpc.core.stage import Kind, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The image or venv that a stage runs in."""

    name: str
    kind: Literal["sif", "venv"]
    path: str
    digest: str
    stat: tuple[int, ...] = ()
    """How an image's file looked before its digest was found."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What the image's lock says is inside; for the manifest."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one input of a stage comes from."""

    name: str
    kind: Kind
    stage: str | None
    """The stage of this plan that produces it, or None: it is there already."""
    value: str
    """The output's name there, or the absolute path, or the model's name on the hub."""
    key: str
    """Key of the producing stage, or the content's hash."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One stage, decided: what it gets, what it needs, and the key that names its result."""

    stage: Stage
    config: Any
    resources: Resources
    site: Site
    """The site as this stage sees it: its own sbatch options are in."""
    environment: Environment
    sources: tuple[Source, ...]
    reads: tuple[str, ...]
    """Absolute paths outside the run that it reads."""
    writes: tuple[str, ...] = ()
    """Absolute paths of folders outside the run that it works in."""
    key: str

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages of this plan that it waits for."""
        return tuple(dict.fromkeys(s.stage for s in self.sources if s.stage is not None))

    def document(self, *, inputs: Mapping[str, Mapping[str, Any]], out: Path, cache: Path) -> dict[str, Any]:
        """config.json: all that the runner in the image is told; `inputs` are the sources with their paths."""
        return {
            "schema": "hpc.config/1",
            "stage": self.name,
            "key": self.key,
            "config": configs.encode(self.config),
            "inputs": dict(inputs),
            "outputs": {
                name: {"kind": artifact.kind, "path": str(out / artifact.path)}
                for name, artifact in self.stage.outputs(self.config).items()
            },
            "environment": dataclasses.asdict(self.environment),
            "resources": dataclasses.asdict(self.resources),
            "cache": str(cache),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages in the order in which they are submitted."""

    stages: tuple[Planned, ...]
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, str]:
        return {p.name: p.key for p in self.stages}


class Facts(Protocol):
    """What planning must know of the world; gathered by the caller."""

    def path(self, text: str) -> str | None:
        """The absolute path that `text` means, or None where nothing is there."""

    def place(self, text: str) -> str:
        """The absolute path that `text` means, be anything there or not."""

    def digest(self, path: str) -> str:
        """The content hash of a file or folder."""

    def environment(self, name: str) -> Environment:
        """The image or venv of that name; an HpcError where it is missing."""

    def source(self, stage: Stage) -> bytes:
        """The stage's source file."""

    def limits(self) -> Limits | None:
        """What the partition and its nodes allow; None where the scheduler sets no limits."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One stage as the settings ask for it."""

    stage: Stage
    config: Any
    overrides: Mapping[str, int]
    """Single values of Resources, from `resources = {…}` or the command line."""
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    """sbatch options of this stage alone, e.g. a partition without GPUs; over those of the site."""


def plan(wishes: Sequence[Wish], wanted: Sequence[str], site: Site, facts: Facts) -> Plan:
    """The plan for the `wanted` stages and those before them whose outputs they need.

    Refused where it cannot work, UsageError where something that it reads is missing.
    """
    by_name = {w.stage.name: w for w in wishes}
    order = list(by_name)
    needed = _closure(wanted, by_name, order)
    limits = facts.limits()
    planned: dict[str, Planned] = {}
    notes: list[str] = []
    for name in order:
        if name in needed:
            one, remark = _one(by_name[name], planned, order, by_name, site, facts, limits)
            planned[name] = one
            notes += remark
    return Plan(stages=tuple(planned.values()), notes=tuple(notes))


def producer(kind: Kind, before: str, order: Sequence[str], wishes: Mapping[str, Wish]) -> tuple[str, str] | None:
    """(stage, output name) of the nearest stage ahead of `before` that produces the kind."""
    for name in reversed(order[: order.index(before)]):
        for output, artifact in wishes[name].stage.outputs(wishes[name].config).items():
            if artifact.kind == kind:
                return name, output
    return None


def _closure(wanted: Sequence[str], wishes: Mapping[str, Wish], order: Sequence[str]) -> set[str]:
    needed: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        wish = wishes[name]
        for given, wanted_input in wish.stage.consumes.items():
            if getattr(wish.config, given, None) is None:
                found = producer(wanted_input.kind, name, order, wishes)
                if found:
                    waiting.append(found[0])
    return needed


def _one(
    wish: Wish,
    planned: Mapping[str, Planned],
    order: Sequence[str],
    wishes: Mapping[str, Wish],
    site: Site,
    facts: Facts,
    limits: Limits | None,
) -> tuple[Planned, list[str]]:
    stage = wish.stage
    found = (_source(wish, name, planned, order, wishes, facts) for name in stage.consumes)
    sources = tuple(source for source in found if source is not None)
    absolute = {s.name: s.value for s in sources if s.stage is None}
    files = {text: _existing(text, stage.name, facts) for text in stage.files(wish.config)}
    folders = {text: facts.place(text) for text in stage.folders(wish.config)}
    config = _with_paths(wish.config, absolute, {**files, **folders})
    if stage.check is not None:
        stage.check(config)
    site = of_stage(site, wish.sbatch)
    resources, notes = fit(stage, dataclasses.replace(stage.resources(config), **wish.overrides), site, limits)
    environment = facts.environment(stage.container)
    key = configs.key_of(
        stage.name,
        _without_paths(config, absolute, {**files, **folders}),
        [[s.name, s.key] for s in sources],
        [facts.digest(files[text]) for text in stage.files(wish.config)],
        environment.digest,
        facts.source(stage),
    )
    reads = tuple(p for p in (*absolute.values(), *files.values()) if p.startswith("/"))
    return (
        Planned(
            stage=stage,
            config=config,
            resources=resources,
            site=site,
            environment=environment,
            sources=sources,
            reads=reads,
            writes=tuple(folders.values()),
            key=key,
        ),
        notes,
    )


def of_stage(site: Site, sbatch: Mapping[str, str | int | bool]) -> Site:
    """The site with one stage's sbatch options: those that the site has fields for, and the rest passed through."""
    own: dict[str, Any] = {k: str(v) for k, v in sbatch.items() if k in {"partition", "account", "qos"}}
    rest = {k: v for k, v in sbatch.items() if k not in own}
    return dataclasses.replace(site, sbatch={**site.sbatch, **rest}, **own)


def fit(stage: Stage, asked: Resources, site: Site, limits: Limits | None) -> tuple[Resources, list[str]]:
    """The resources that the site can be asked for, with what was changed; Refused where they can't be had."""
    if site.gpus == "none" and asked.gpus_per_node:
        note = f"{stage.name}: site '{site.name}' gives no GPUs, it runs on the CPU"
        asked, notes = dataclasses.replace(asked, gpus_per_node=0), [note]
    else:
        notes = []
    if asked.nodes < 1 or asked.cpus_per_task < 1 or asked.mem_gb < 1 or asked.time_min < 1 or asked.gpus_per_node < 0:
        raise UsageError(f"{stage.name}: resources must be positive, not {asked}", hint="see `resources` in hpc.toml")
    if site.scheduler == "local" and asked.nodes > 1:
        raise Refused(
            f"{stage.name} asks for {asked.nodes} nodes, but site '{site.name}' is this machine alone",
            hint="choose a Slurm site with --site, or nodes = 1",
        )
    if stage.launcher == "python" and (asked.nodes > 1 or asked.gpus_per_node > 1):
        raise Refused(
            f"{stage.name} is one process: it cannot use {asked.gpus} GPUs on {asked.nodes} node(s)",
            hint=f"set {stage.name}.resources to nodes = 1 and gpus_per_node = 1",
        )
    if limits is not None:
        refuse(stage.name, asked, site, limits)
    return asked, notes


def _source(
    wish: Wish,
    name: str,
    planned: Mapping[str, Planned],
    order: Sequence[str],
    wishes: Mapping[str, Wish],
    facts: Facts,
) -> Source | None:
    """Where the input comes from; None for one that may be missing and is."""
    stage, kind = wish.stage, wish.stage.consumes[name].kind
    found = producer(kind, stage.name, order, wishes)
    given = getattr(wish.config, name, None)
    if given is None and found is None:
        given = _given_before(name, kind, stage.name, order, wishes)
    if given is not None:
        path = facts.path(given)
        if path is None and kind == "hf_model" and is_hub_name(given):
            return Source(name=name, kind=kind, stage=None, value=given, key=f"hub:{given}")
        if path is None:
            raise UsageError(
                f"{stage.name}.{name}: there is no '{given}'",
                hint="give a folder or file that exists"
                + (", or a model's name on the hub (organisation/name)" if kind == "hf_model" else ""),
            )
        return Source(name=name, kind=kind, stage=None, value=path, key=facts.digest(path))
    if found is None and stage.consumes[name].optional:
        return None
    if found is None:
        raise Refused(
            f"{stage.name} needs a {kind} as '{name}', and no stage before it in the pipeline makes one",
            hint=f"set {stage.name}.{name}, or put the stage that makes it into pipeline.stages",
        )
    return Source(name=name, kind=kind, stage=found[0], value=found[1], key=planned[found[0]].key)


def _given_before(name: str, kind: Kind, before: str, order: Sequence[str], wishes: Mapping[str, Wish]) -> str | None:
    """What an earlier stage was given as its input of the same name: merge takes finetune's base_model."""
    for earlier in reversed(order[: order.index(before)]):
        wanted = wishes[earlier].stage.consumes.get(name)
        value = getattr(wishes[earlier].config, name, None)
        if wanted is not None and wanted.kind == kind and value is not None:
            return str(value)
    return None


def is_hub_name(text: str) -> bool:
    """True for organisation/name.

    >>> is_hub_name("meta-llama/Llama-2-7b-chat-hf"), is_hub_name("./models/x"), is_hub_name("models/x.gguf")
    (True, False, False)
    """
    head, slash, tail = text.partition("/")
    return bool(slash and head and tail) and "/" not in tail and head[0] not in "./~" and not tail.endswith(".gguf")


def _existing(text: str, stage: str, facts: Facts) -> str:
    path = facts.path(text)
    if path is None:
        raise UsageError(
            f"{stage}: the file '{text}' is not there",
            hint="paths in hpc.toml count from its folder; check the spelling",
        )
    return path


def _with_paths(config: Any, absolute: Mapping[str, str], files: Mapping[str, str]) -> Any:
    """The config with every path that it names made absolute."""
    changes: dict[str, Any] = dict(absolute)
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        if isinstance(value, str) and value in files:
            changes[name] = files[value]
        elif isinstance(value, tuple) and any(v in files for v in value):
            changes[name] = tuple(files.get(v, v) for v in value)
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if hasattr(config, k)})


def _without_paths(config: Any, absolute: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Any]:
    """The config as it counts in the key: a path counts by its content, not by where it lies."""
    gone = {*absolute.values(), *files.values()}
    return {k: None if _is_path(v, gone) else v for k, v in configs.encode(config).items()}


def _is_path(value: Any, paths: set[str]) -> bool:
    return value in paths if isinstance(value, str) else isinstance(value, list) and any(v in paths for v in value)
