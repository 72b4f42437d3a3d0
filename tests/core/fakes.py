"""Stages and facts that exist only in tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc.core.errors import Refused
from hpc.core.limits import Limits, NodeKind, Partition
from hpc.core.plan import Environment, Wish
from hpc.core.stage import Artifact, Input, Kind, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The config of every fake stage."""

    data: tuple[str, ...] = ()
    dataset: str | None = None
    model: str | None = None
    endpoint: str | None = None
    rank: int = 8


def make(
    name: str,
    *,
    consumes: Mapping[str, Kind] | None = None,
    produces: Kind = "dataset",
    resources: Resources | None = None,
    check: Callable[[Any], None] | None = None,
) -> Stage:
    """A stage that runs nothing."""
    return Stage(
        name=name,
        summary="a fake",
        config=Settings,
        container="train",
        consumes={name: Input(kind=kind) for name, kind in (consumes or {}).items()},
        outputs=lambda config: {produces: Artifact(kind=produces, path="result")},
        resources=lambda config: resources or Resources(),
        run=lambda config, ctx: None,
        files=lambda config: config.data,
        check=check,
    )


def chain() -> list[Stage]:
    """prepare -> finetune -> merge, each fed by the one before."""
    return [
        make("prepare"),
        make("finetune", consumes={"dataset": "dataset"}, produces="lora_adapter"),
        make("merge", consumes={"adapter": "lora_adapter"}, produces="hf_model"),
    ]


def wish(stage: Stage, **config: Any) -> Wish:
    """The stage with this config; resources = {…} overrides single resources."""
    overrides = config.pop("resources", {})
    return Wish(stage=stage, config=Settings(**config), overrides=overrides)


@dataclass
class FakeFacts:
    """A world of named files with contents."""

    files: dict[str, str] = field(default_factory=dict)
    """Path as the settings spell it -> content. It lies in `root`."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Folder of a model or a stage as the settings spell it -> its config.json."""
    stored: dict[str, int] = field(default_factory=dict)
    """Folder of a model as the settings spell it -> bytes of its weights."""
    root: str = "/project"
    image: str = "image-1"
    versions: dict[str, str] = field(default_factory=dict)
    sources: dict[str, bytes] = field(default_factory=dict)
    partitions: Limits | None = None
    missing_image: bool = False

    def path(self, text: str) -> str | None:
        return f"{self.root}/{text}" if text in self.files else None

    def document(self, path: str) -> dict[str, Any] | None:
        return self.models.get(path.removeprefix(f"{self.root}/"))

    def weights(self, path: str) -> int | None:
        return self.stored.get(path.removeprefix(f"{self.root}/"))

    def digest(self, path: str) -> str:
        return hashlib.sha256(self.files[path.removeprefix(f"{self.root}/")].encode()).hexdigest()

    def environment(self, name: str) -> Environment:
        if self.missing_image:
            raise Refused(f"the environment '{name}' is not there")
        return Environment(name=name, kind="sif", path=f"/images/{name}.sif", digest=self.image, versions=self.versions)

    def source(self, stage: Stage) -> bytes:
        return self.sources.get(stage.name, b"source")

    def limits(self) -> Limits | None:
        return self.partitions


def partition(name: str = "batch", *nodes: NodeKind, **values: Any) -> Partition:
    """A partition of one kind of node: 4 x (128 CPUs, 1000 GiB, 8 a100)."""
    made = nodes or (NodeKind(count=4, cpus=128, mem_gb=1000, gpus={"a100": 8}),)
    return Partition(**{"name": name, "default": False, "up": True, "time_min": None, "nodes": made, **values})
