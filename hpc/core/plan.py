"""PURE: stages + configs + site + facts -> the DAG with keys, resources and refusals. Reads and changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hpc.core import config as configs
from hpc.core import gpus, paths, shape
from hpc.core.errors import Refused, UsageError
from hpc.core.feeding import Source, closure, model_behind, source
from hpc.core.limits import Limits, fit, partition_of
from hpc.core.site import Site
from hpc.core.stage import Around, Resources, Stage


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
    digests: Mapping[str, str] = field(default_factory=dict)
    """Those that count by their content -> its hash, which is in the key."""
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
            "reads": dict(self.digests),
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

    def document(self, path: str) -> Mapping[str, Any] | None:
        """The config.json in the folder `path`, of a model or a stage; None where there is none."""

    def weights(self, path: str) -> int | None:
        """Bytes of the weights in a model's folder; None where none lie there."""

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
    overrides: Mapping[str, Any]
    """Single values of Resources, from `resources = {…}` or the command line."""
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    """sbatch options of this stage alone, e.g. a partition without GPUs; over those of the site."""


def plan(wishes: Sequence[Wish], wanted: Sequence[str], site: Site, facts: Facts) -> Plan:
    """The plan for the `wanted` stages and those before them whose outputs they need.

    Refused where it cannot work, UsageError where something that it reads is missing.
    """
    limits = facts.limits()
    by_name = {w.stage.name: w for w in settled(wishes, site, facts, limits)}
    order = list(by_name)
    planned: dict[str, Planned] = {}
    idle = {name: why for name in wanted if (why := by_name[name].stage.unneeded(by_name[name].config))}
    notes = [f"{name}: nothing to do, {why}" for name, why in idle.items()]
    needed = closure([name for name in wanted if name not in idle], by_name, order)
    for name in order:
        if name in needed:
            one, remark = _one(by_name[name], planned, order, by_name, site, facts, limits)
            planned[name] = one
            notes += remark
    return Plan(stages=tuple(planned.values()), notes=tuple(notes))


def settled(wishes: Sequence[Wish], site: Site, facts: Facts, limits: Limits | None) -> list[Wish]:
    """The wishes with every config settled: what was left open follows from the site, the cards and the model."""
    by_name = {w.stage.name: w for w in wishes}
    return [
        dataclasses.replace(w, config=w.stage.settle(w.config, _around(w, by_name, site, facts, limits)))
        if w.stage.settle is not None
        else w
        for w in wishes
    ]


def _around(wish: Wish, wishes: Mapping[str, Wish], site: Site, facts: Facts, limits: Limits | None) -> Around:
    site = of_stage(site, wish.sbatch)
    partition = None
    if limits is not None and (site.partition is None or site.partition in limits):
        partition = partition_of(site, limits)
    nodes = partition.nodes if partition else ()
    types = {kind for node in nodes for kind in node.gpus if kind}
    kind = site.gres.partition(":")[2]
    model = model_behind(wish.stage.name, list(wishes), wishes)
    path = facts.path(model) if model is not None else None
    config = facts.document(path) if path is not None else None
    found = shape.read(config) if config is not None else None
    if found is not None and path is not None and model == getattr(wish.config, "model", None):
        # itself, not what it is made of: what is made of quantised files need not be
        found = dataclasses.replace(found, stored=facts.weights(path))
    return Around(
        site=site,
        shape=found,
        model=model or "",
        card=gpus.of_site(site.gpu, site.gres, types) if site.gpus != "none" else None,
        node_gpus=max((node.gpus.get(kind, 0) if kind else node.gpu_total for node in nodes), default=0) or None,
    )


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
    found = (source(wish, name, planned, order, wishes, facts) for name in stage.consumes)
    sources = tuple(one for one in found if one is not None)
    absolute = {s.name: s.value for s in sources if s.stage is None}
    files = {text: _existing(text, stage.name, facts) for text in stage.files(wish.config)}
    folders = {text: facts.place(text) for text in stage.folders(wish.config)}
    config = paths.absolute(wish.config, absolute, {**files, **folders})
    if stage.check is not None:
        stage.check(config)
    around = _around(wish, wishes, site, facts, limits)
    site = around.site
    environment = facts.environment(stage.environment(config))
    remarks: tuple[str, ...] = ()
    asked = stage.resources(config)
    if stage.size is not None:
        makers = {s.name: wishes[s.stage].config for s in sources if s.stage is not None}
        known = dataclasses.replace(
            around,
            inputs=tuple(s.name for s in sources),
            makers=makers,
            versions=environment.versions,
            given=wish.overrides,
        )
        asked, remarks = stage.size(config, known)
    resources, notes = fit(stage, dataclasses.replace(asked, **wish.overrides), site, limits)
    notes += remarks
    card = around.card.card if around.card is not None else None
    if card is not None and card.slice and stage.launcher == "torchrun" and resources.gpus > 1:
        raise Refused(
            f"{stage.name}: {resources.gpus} {card.name} slices can't train together: NCCL joins whole cards alone",
            hint=f"set {stage.name}.resources to nodes = 1 and gpus_per_node = 1, or a site.gres of whole cards",
        )
    contents = {text: facts.digest(path) for text, path in files.items()}
    key = configs.key_of(
        stage.name,
        paths.content(config, absolute, {**files, **folders}),
        [[s.name, s.key] for s in sources],
        [contents[text] for text in stage.files(wish.config)],
        environment.digest,
        facts.source(stage),
    )
    reads = tuple(p for p in (*absolute.values(), *files.values()) if p.startswith("/"))
    given = {s.value: s.key for s in sources if s.stage is None and s.kind != "endpoint" and s.value in reads}
    return (
        Planned(
            stage=stage,
            config=config,
            resources=resources,
            site=site,
            environment=environment,
            sources=sources,
            reads=reads,
            digests={**given, **{files[text]: content for text, content in contents.items()}},
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


def _existing(text: str, stage: str, facts: Facts) -> str:
    path = facts.path(text)
    if path is None:
        raise UsageError(
            f"{stage}: the file '{text}' is not there",
            hint="paths in hpc.toml count from its folder; check the spelling",
        )
    return path
