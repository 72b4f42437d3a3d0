"""One cluster's profile, as plain data; profiles may build on each other with `extends`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpc.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where jobs run, and what that place wants to be told."""

    name: str
    scheduler: Literal["local", "slurm"] = "local"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: Literal["gres", "gpus_per_node", "none", "detect"] = "gres"
    """How GPUs are asked for: --gres=<gres>:N, --gpus-per-node=N, not at all, or as many as this machine has."""
    gres: str = "gpu"
    """The gres name, with its type where the site has one: gpu, gpu:a100, gpu:1g.10gb."""
    gpu: str | None = None
    """The card, where `gres` does not tell it: a100-40, h100, l40s, …; for estimates of memory."""
    mpi: str = "pmix"
    """How srun starts the ranks of a job on several nodes (srun --mpi=list): it must fit the image's MPI."""
    mem: bool = True
    """Ask for memory (--mem). Some sites give whole nodes and refuse it."""
    images: str | None = None
    """The folder of NAME.sif, one per environment."""
    scratch: str | None = None
    """A folder on each node's own disk: images are copied there once. None: they run from where they lie."""
    staged_gb: int = 200
    """Room for staged images there, GiB per user; the longest unused go first."""
    stage_readers: int = 8
    """How many nodes copy the same image from the shared file system at once; 0: no limit."""
    venvs: str = "${XDG_DATA_HOME:-~/.local/share}/hpc/venvs"
    """The folder of NAME/bin/python, for environments without an image."""
    environments: Mapping[str, str] = field(default_factory=dict)
    """Environment name -> its SIF, or its venv folder, where it lies elsewhere."""
    verify_key: str | None = None
    """A public key in PEM: images that bear no good signature of it are refused."""
    apptainer: str | None = None
    """The container program; None: `apptainer`, else `singularity`, from the node's PATH."""
    binds: tuple[str, ...] = ()
    """Further folders that every container sees at the same path."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Set in every container."""
    passes: tuple[str, ...] = ()
    """Names (or patterns like MY_*) of further job variables that reach the container."""
    setup: tuple[str, ...] = ()
    """Shell lines of the batch script before the job, e.g. `module load apptainer`."""
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)
    """Further sbatch options, passed through as they are."""
    login_host: str | None = None
    """The login node's name as a laptop's ssh knows it; for `hpc tunnel`."""
    reach: Literal["direct", "jump", "relay"] = "direct"
    """How a service on a node is reached from the login node: node:port answers there; by ssh to the node; or by bytes
    over `srun --overlap`. With the latter two a service listens on the node's loopback alone."""
    network: Literal["nodes", "login"] = "nodes"
    """Where the internet is reached: from the compute nodes, or from the login node alone. What needs it runs there."""
    python: str | None = None
    """The host's Python on the compute nodes; None: the one that runs `hpc`."""
    signal_delay_s: int = 90
    """Seconds between the warning signal and the time limit: long enough to save a checkpoint."""
    requeue: int = 0
    """How often a job that has saved its work at the time limit is queued again by itself."""
    heartbeat_s: int = 30
    """Seconds between two heartbeats of a running job."""


def resolve(name: str, read: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """The profile's values with those of its ancestors beneath them; tables are merged key by key.

    `read` gives one profile's own table by name. UsageError where profiles extend each other in a circle.
    """
    chain: list[Mapping[str, Any]] = []
    seen: list[str] = []
    following: str | None = name
    while following is not None:
        if following in seen:
            raise UsageError(
                f"the site profiles extend each other in a circle: {' -> '.join([*seen, following])}",
                hint="take one `extends` out",
            )
        seen.append(following)
        table = read(following)
        chain.append(table)
        following = table.get("extends")
        if not isinstance(following, str | None):
            raise UsageError(f"site profile '{seen[-1]}': extends = {following!r} is no name", hint='extends = "slurm"')
    merged: dict[str, Any] = {}
    for table in reversed(chain):
        merge(merged, {k: v for k, v in table.items() if k != "extends"})
    return merged


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put `over` on `base`; tables are merged, everything else replaced.

    >>> b = {"env": {"A": "1"}, "qos": "x"}; merge(b, {"env": {"B": "2"}, "qos": "y"}); b
    {'env': {'A': '1', 'B': '2'}, 'qos': 'y'}
    """
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value
