"""The engine lab: JupyterLab in the image that builds engines and serves them."""

from __future__ import annotations

from dataclasses import dataclass

from hpc.core import endpoint
from hpc.core.stage import Context, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class EnginelabConfig:
    """What it shares with the finetuning lab is set in [jupyter]."""

    workspace: str = "workspace"
    """Set in [jupyter]."""
    folders: tuple[str, ...] = ()
    """Set in [jupyter]."""
    port: int = 0
    """Set in [jupyter]."""
    idle_min: int = 0
    """Set in [jupyter]."""
    ready_s: int = 300
    """Set in [jupyter]."""


def run(config: EnginelabConfig, ctx: Context) -> None:
    from hpc.inside import jupyter

    jupyter.run(
        ctx,
        folder=config.workspace,
        notebook="engine-lab.ipynb",
        port=config.port,
        idle_min=config.idle_min,
        ready_s=config.ready_s,
    )


STAGE = Stage(
    name="enginelab",
    summary="JupyterLab where engines are built and served",
    config=EnginelabConfig,
    container="engine-lab",
    consumes={},
    outputs=lambda config: {},
    folders=lambda config: (config.workspace, *config.folders),
    resources=lambda config: Resources(cpus_per_task=8, mem_gb=32, time_min=240),
    service=True,
    check=lambda config: endpoint.refuse("jupyter.port", config.port),
    settings_of="jupyter",
    run=run,
)
