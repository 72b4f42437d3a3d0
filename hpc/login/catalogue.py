"""What stages there are: `hpc stages`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.core.stage import Stage, available, load
from hpc.login import view


def rows() -> list[dict[str, Any]]:
    """One row per stage, as hpc.stages/1 has them."""
    return [
        {
            "stage": s.name,
            "consumes": {name: i.kind for name, i in s.consumes.items()},
            "produces": produced(s),
            "environment": s.container if isinstance(s.container, str) else "by its settings",
            "summary": s.summary,
        }
        for s in map(load, available())
    ]


def produced(stage: Stage) -> dict[str, str]:
    """Output name -> kind, for a config with the defaults (and stand-ins for what has none)."""
    fields = dataclasses.fields(stage.config)
    missing = dataclasses.MISSING
    required = {f.name: "" for f in fields if f.default is missing and f.default_factory is missing}
    return {name: artifact.kind for name, artifact in stage.outputs(stage.config(**required)).items()}


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """The table for a person."""
    kinds = [(", ".join(r["consumes"].values()) or "-", ", ".join(r["produces"].values()) or _none(r)) for r in found]
    view.table(
        ("STAGE", "CONSUMES", "PRODUCES", "ENVIRONMENT", "WHAT IT DOES"),
        [(r["stage"], *k, r["environment"], r["summary"]) for r, k in zip(found, kinds, strict=True)],
    )


def _none(row: Mapping[str, Any]) -> str:
    """A service produces nothing; another stage without an output by default produces what its settings ask for."""
    return "-" if load(row["stage"]).service else "by its settings"
