"""The finetuning lab: JupyterLab on a node, for one user. It is reached from a laptop with `hpc tunnel`."""

from __future__ import annotations

from dataclasses import dataclass

from hpc.core import endpoint
from hpc.core.stage import Context, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class JupyterConfig:
    """Where it works, and how long. The engine lab's too."""

    workspace: str = "workspace"
    """The folder that it shows; the labs' notebooks are put there once, and never overwritten."""
    folders: tuple[str, ...] = ()
    """Further folders that the notebooks can read and write."""
    open: str = ""
    """A notebook of the workspace that is opened first."""
    gpus: int = 1
    port: int = 0
    """A port that is wished for; 0 or one that is taken: a free one is chosen on the node."""
    idle_min: int = 0
    """Minutes without any activity after which it ends itself; 0: never."""
    ready_s: int = 300
    """Seconds until it must have answered."""


def run(config: JupyterConfig, ctx: Context) -> None:
    from hpc.inside import jupyter

    jupyter.run(
        ctx,
        folder=config.workspace,
        notebook=config.open,
        port=config.port,
        idle_min=config.idle_min,
        ready_s=config.ready_s,
    )


STAGE = Stage(
    name="jupyter",
    summary="JupyterLab on a node, with the labs' notebooks",
    config=JupyterConfig,
    container="lab",
    consumes={},
    outputs=lambda config: {},
    folders=lambda config: (config.workspace, *config.folders),
    resources=lambda config: Resources(gpus_per_node=config.gpus, cpus_per_task=8, mem_gb=64, time_min=240),
    service=True,
    check=lambda config: endpoint.refuse("jupyter.port", config.port),
    run=run,
)
