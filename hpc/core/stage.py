"""What a stage is, and how the stages are found: every module of `stages/` that has a STAGE. No registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hpc.core.errors import HpcError, UsageError, did_you_mean

if TYPE_CHECKING:  # the node and the image import this file while the user waits
    from hpc.core.gpus import Found
    from hpc.core.shape import Shape
    from hpc.core.site import Site

Kind = Literal[
    "records", "dataset", "hf_model", "lora_adapter", "trtllm_checkpoint", "engine", "endpoint", "report",
]  # fmt: skip
Launcher = Literal["python", "workers", "torchrun", "mpi"]
"""python: one process, which can use one GPU; workers: one process that starts others, one for each GPU of its node;
torchrun: a process for each GPU, on any number of nodes; mpi: as workers on one node, and on several a task of Slurm
for each GPU."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one stage asks of the scheduler."""

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 4
    tasks_per_node: int = 1
    """Processes that Slurm starts on each node, as ranks of MPI where there are several."""
    exclusive: bool = False
    """Whole nodes, for this job alone."""
    mem_gb: int = 16
    """Host memory per node, GiB."""
    time_min: int = 60
    """Time limit, minutes."""

    @property
    def gpus(self) -> int:
        """GPUs on all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def tasks(self) -> int:
        """Processes that Slurm starts, on all nodes."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True, kw_only=True)
class Input:
    """One thing that a stage consumes.

    It comes from the field of the same name in the stage's config where that is set (a path, or for a model also
    a name on the hub), else from the stage before it that produces this kind, else it is what an earlier stage was
    given under the same name. An endpoint is the folder of a serving stage, or the address of another service.
    """

    kind: Kind
    optional: bool = False
    """The stage can do without: where nothing gives it, `ctx.inputs` does not have it."""
    original: bool = False
    """It is what the first stage with an input of this name got, not what stages since then made of it."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One thing that a stage produces: its kind, and its folder or file below the stage's `out/`."""

    kind: Kind
    path: str


@dataclass(frozen=True, kw_only=True)
class Around:
    """What planning knows beside a stage's own config. None: not known here."""

    site: Site
    shape: Shape | None = None
    """Of the model that its hf_model input is, or will be: a tuned model has its base's shape."""
    model: str = ""
    """Where that shape was read, or should have been."""
    card: Found | None = None
    """The site's GPU."""
    node_gpus: int | None = None
    """GPUs of one node."""
    inputs: tuple[str, ...] = ()
    """Names of the inputs that it will have."""
    makers: Mapping[str, Any] = field(default_factory=dict)
    """Name of an input -> the config of the stage before that makes it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries in its environment."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Single values of Resources that the user has set: they count, whatever the stage asks for."""


class Context(Protocol):
    """What the runner hands to `run`, inside the image."""

    inputs: Mapping[str, str]
    """Input name -> absolute path (or, for a model, its name on the hub)."""
    outputs: Mapping[str, Path]
    """Output name -> absolute path to write to; its parent exists."""
    checkpoints: Path
    """A folder that outlives this attempt: what is saved here is there again when the stage is resumed."""
    cache: Path
    """A folder shared by all runs, for things that are made once (a converted model)."""
    folder: Path
    """The stage's own folder in the run."""
    bind: str
    """The address that a service listens on."""

    def progress(self, done: float, total: float, message: str = "", **metrics: float) -> None:
        """Say how far the work is; shown by `hpc status` and `--wait`. Cheap: call it at every step."""

    def metric(self, **values: Any) -> None:
        """Record figures or short texts in the manifest (JSON values)."""

    def event(self, phase: str, **values: Any) -> None:
        """Say what phase the work is in, e.g. `ready`; shown by `hpc status`."""

    def remark(self, text: str) -> None:
        """One sentence that `hpc status` and `hpc logs` show when the stage has completed. The last one counts."""

    def stopping(self) -> bool:
        """True once the scheduler asked the job to end (preemption, time limit): save and return soon."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline, declared by its module in `stages/`."""

    name: str
    summary: str
    config: type[Any]
    """A frozen, keyword-only dataclass of plain values: str, int, float, bool, tuples of them, None, Literal."""
    container: str | Callable[[Any], str]
    """The environment it runs in: a name in `containers/` (train, serve-cpu, …), or config -> that name."""
    consumes: Mapping[str, Input]
    outputs: Callable[[Any], Mapping[str, Artifact]]
    """config -> what it will produce."""
    resources: Callable[[Any], Resources]
    """config -> what it needs; `resources = {…}` in the settings overrides single values."""
    run: Callable[[Any, Context], None]
    files: Callable[[Any], tuple[str, ...]] = field(default=lambda config: ())
    """config -> further files that it reads (data). Their content counts in the key; they must exist."""
    folders: Callable[[Any], tuple[str, ...]] = field(default=lambda config: ())
    """config -> folders outside the run that it works in. Missing ones are made, for their owner alone."""
    service: bool = False
    """It serves until it is ended, by `hpc.inside.service`. It never completes, so nothing of it is taken over."""
    private: bool = False
    """A service with a network and a shared memory of its own, which no other user of the node can reach. Its ports are
    opened outside, and handed in."""
    succession: Callable[[Any], tuple[int, int]] = field(default=lambda config: (0, 0))
    """config -> how many jobs take over from a service one after another; minutes before its limit that each starts."""
    ports: tuple[str, ...] = ("http",)
    """Their names; the first one answers HTTP."""
    check: Callable[[Any], None] | None = None
    """Looks at config and files before anything is queued; raises an HpcError. Standard library, seconds at most."""
    network: bool = False
    """It fetches from the internet: it runs on the login node where the site's nodes have none."""
    launcher: Launcher = "python"
    settings_of: str | None = None
    """Another stage: the fields that both have are set there, for both."""
    settle: Callable[[Any, Around], Any] | None = None
    """(config, what is around) -> the config with all that was left open decided. It refuses nothing."""
    size: Callable[[Any, Around], tuple[Resources, tuple[str, ...]]] | None = None
    """(settled config, what is around) -> resources in place of `resources`, and notes for the plan; Refused."""
    unneeded: Callable[[Any], str] = field(default=lambda config: "")
    """Settled config -> why there is nothing to do; the plan then leaves the stage out."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Values of the field `preset` -> other values for what is not set beside it."""

    def chosen(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of the preset that these settings name."""
        return self.presets.get(str(values.get("preset", "")), {})

    def shared(self) -> frozenset[str]:
        """The fields whose values stand in the table of `settings_of`."""
        if self.settings_of is None:
            return frozenset()
        other = load(self.settings_of)
        own, theirs = ({f.name for f in fields(s.config)} for s in (self, other))
        return frozenset(own & theirs)

    def environment(self, config: Any) -> str:
        """The name of the environment that it runs in with this config."""
        return self.container if isinstance(self.container, str) else self.container(config)


def load(name: str) -> Stage:
    """The stage of that name; UsageError, with the nearest name, where there is none."""
    names = available()
    if name not in names:
        raise UsageError(f"there is no stage '{name}'", hint=did_you_mean(name, names))
    try:
        stage = getattr(importlib.import_module(f"stages.{name}"), "STAGE", None)
    except (ImportError, SyntaxError) as error:
        raise HpcError(
            f"stages/{name}.py cannot be imported: {error}",
            hint="a stage imports heavy libraries inside run(); a helper's name begins with _",
        ) from error
    if not isinstance(stage, Stage) or stage.name != name:
        raise HpcError(
            f"stages/{name}.py must define STAGE = Stage(name='{name}', …)",
            hint="a module that is no stage gets a name that begins with _",
        )
    return stage


def available() -> list[str]:
    """The names of all stages, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules([str(folder())]) if not m.name.startswith("_"))


def folder() -> Path:
    """The `stages` package that lies beside `hpc`; anybody else's `stages` on the path is refused."""
    import stages

    here = Path(__file__).resolve().parent.parent.parent
    found = Path(str(stages.__file__)).resolve().parent
    if found.parent != here:
        raise HpcError(
            f"another package named 'stages' hides ours: {found}",
            hint="leave that folder, or take it off PYTHONPATH",
        )
    return found


def source(stage: Stage) -> bytes:
    """The stage's own source file: part of its key."""
    return (folder() / f"{stage.name}.py").read_bytes()
