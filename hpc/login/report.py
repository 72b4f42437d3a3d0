"""All that a run's files say of it, for `hpc report`; Slurm is asked no more than `hpc status` asks it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hpc.core import evaluation, passport, rundir
from hpc.core import stage as stage_files
from hpc.core.config import canonical, key_of
from hpc.core.errors import HpcError
from hpc.core.rundir import RunDir, StageDir
from hpc.login import figures
from hpc.login.states import StageState

_LOG = "training/log.jsonl"
"""In the folder of a stage that trains."""
_MOST_POINTS = 600
"""Of a curve: more are not told apart."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One end of one stage."""

    number: int
    state: str
    cause: str
    host: str
    started: float
    ended: float


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One stage of the run."""

    name: str
    state: str
    reason: str
    job_id: str
    node: str
    after: Sequence[str]
    submitted: float | None
    reused: str
    attempts: Sequence[Attempt]
    gpus: int
    nodes: int
    gpu_hours: float
    """Of all attempts, the one at work too."""
    node_hours: float
    settings: Mapping[str, Any]
    """Those that differ from the defaults."""
    environment: str
    digest: str
    versions: Mapping[str, str]
    metrics: Mapping[str, Any]
    outputs: Mapping[str, str]
    """Name of an output -> one digest of all its files."""
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    passport: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    """The latest `hpc bench` of a service."""
    elapsed_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run."""

    run: str
    project: str
    site: str
    created: float
    made: float
    problem: str
    """Why Slurm could not be asked; empty where it could."""
    commit: str
    stages: Sequence[StageReport]

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        return next((evaluation.verdict(s.evaluation) for s in self.stages if s.evaluation), "")


def collect(run: RunDir, asked: Mapping[str, Any], rows: Sequence[StageState], problem: str = "") -> Report:
    """The report of a run whose stages stand as `rows` say."""
    return Report(
        run=run.id,
        project=str(asked.get("project", "")),
        site=str(asked.get("site", "")),
        created=float(asked.get("created", 0)),
        made=time.time(),
        problem=problem,
        commit=str((asked.get("git") or {}).get("commit", "")),
        stages=[_stage(run, row) for row in rows],
    )


def _stage(run: RunDir, row: StageState) -> StageReport:
    folder = (RunDir(run.path.parent / row.reused) if row.reused else run).stage(row.stage)
    config = rundir.read_json(folder.config) or {}
    manifest = rundir.read_json(folder.manifest) or {}
    if manifest.get("key") != row.key:  # of an earlier submission with other settings
        manifest = {}
    resources = config.get("resources", {})
    nodes = int(resources.get("nodes", 1))
    gpus = nodes * int(resources.get("gpus_per_node", 0))
    attempts = [] if row.reused else _attempts(folder)
    seconds = sum(a.ended - a.started for a in attempts)
    if row.active:
        seconds += row.elapsed_s or 0
    environment = manifest.get("environment") or config.get("environment") or {}
    out = {name: Path(o["path"]) for name, o in manifest.get("outputs", {}).items()}
    return StageReport(
        name=row.stage,
        state=row.state,
        reason=row.reason,
        job_id=row.job_id,
        node=row.node,
        after=list((rundir.read_json(folder.job) or {}).get("after", ())),
        submitted=row.submitted,
        reused=row.reused,
        attempts=attempts,
        gpus=gpus,
        nodes=nodes,
        gpu_hours=seconds * gpus / 3600,
        node_hours=seconds * nodes / 3600,
        settings=_differing(row.stage, config.get("config", {})),
        environment=str(environment.get("name", "")),
        digest=str(environment.get("digest", "")),
        versions=manifest.get("versions", {}),
        metrics=manifest.get("metrics") or {},
        outputs={name: _digest(o.get("files")) for name, o in manifest.get("outputs", {}).items()},
        curves=_curves(folder.path / _LOG),
        evaluation=next((d for p in out.values() if (d := _document(p, evaluation.SCHEMA))), None),
        passport=next((d for p in out.values() if (d := _document(p / passport.FILE, passport.SCHEMA))), None),
        bench=_document(folder.bench, figures.SCHEMA),
        elapsed_s=row.elapsed_s,
    )


def _document(path: Path, schema: str) -> Mapping[str, Any] | None:
    try:
        found = rundir.read_json(path)
    except OSError:  # a folder, or gone
        return None
    return found if found is not None and found.get("schema") == schema else None


def _attempts(folder: StageDir) -> list[Attempt]:
    """Every end that is written down, also those before a requeue."""
    found = []
    for path in folder.path.glob("attempt-*/outcome*.json"):
        ended = rundir.read_json(path) or {}
        if "started" in ended and "ended" in ended:
            found.append(
                Attempt(
                    number=rundir.AttemptDir(path.parent).number,
                    state=str(ended.get("state", "")),
                    cause=str(ended.get("cause", "")),
                    host=str(ended.get("host", "")),
                    started=float(ended["started"]),
                    ended=float(ended["ended"]),
                )
            )
    return sorted(found, key=lambda a: a.started)


def _differing(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        known = {f.name: f.default for f in fields(stage_files.load(name).config) if f.default is not MISSING}
    except HpcError:  # a stage that this checkout does not have
        known = {}
    return {k: v for k, v in config.items() if k not in known or canonical(known[k]) != canonical(v)}


def _digest(files: Any) -> str:
    return key_of(files) if files else ""


def _curves(log: Path) -> dict[str, list[tuple[float, float]]]:
    """Reading -> its (step, value); what is no number is left out, and so is what more points would not show."""
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            step = float(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for name in ("loss", "eval_loss", "learning_rate"):
            value = entry.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((step, float(value)))
    return {name: points[:: 1 + len(points) // _MOST_POINTS] for name, points in found.items()}
