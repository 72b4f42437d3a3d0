"""JupyterLab on a node, for one user, with the lab's notebooks: reached from a laptop with `hpc tunnel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc.core.stage import Context, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class JupyterConfig:
    """Where it works, and how long."""

    workspace: str = "workspace"
    """The folder that it shows; the lab's notebooks are put there once, and never overwritten."""
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
    import os
    import sys
    import tempfile
    from pathlib import Path
    from urllib.parse import quote

    from hpc.core.assets import TEMPLATES
    from hpc.inside.service import Server, fill, serve

    workspace = Path(config.workspace)
    opened = f"/lab/tree/{quote(config.open)}" if config.open else "/lab"
    own = workspace / ".jupyter"
    own.mkdir(mode=0o700, exist_ok=True)
    page = own / "labconfig" / "page_config.json"
    page.parent.mkdir(exist_ok=True)
    if not page.exists():  # it would ask whether to fetch news, where there is no network
        page.write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}\n')
    for name in fill(workspace, TEMPLATES / "labs"):
        print(f"new in the workspace: {name}", flush=True)

    with tempfile.TemporaryDirectory(prefix="hpc-jupyter-") as runtime:  # short: it holds sockets, and is ours alone

        def argv(ports: Mapping[str, int]) -> Sequence[str]:
            return [
                sys.executable, "-m", "jupyterlab", "--no-browser",
                f"--ServerApp.ip={ctx.bind}", f"--ServerApp.port={ports['http']}", "--ServerApp.port_retries=0",
                f"--ServerApp.root_dir={workspace}", "--ServerApp.allow_remote_access=True",
                f"--LabApp.default_url={opened}",
                "--KernelManager.transport=ipc",  # else every user of the node could talk to the kernels' ports
                f"--ServerApp.shutdown_no_activity_timeout={config.idle_min * 60}",
                f"--MappingKernelManager.cull_idle_timeout={config.idle_min * 60}",
                "--LabApp.extension_manager=readonly",  # the image cannot be written
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                *(["--allow-root"] if os.getuid() == 0 else []),
            ]  # fmt: skip

        def env(token: str) -> Mapping[str, str]:
            return {
                "JUPYTER_TOKEN": token,
                "JUPYTER_RUNTIME_DIR": runtime,
                "JUPYTER_CONFIG_DIR": str(own),
                "JUPYTER_DATA_DIR": str(own / "data"),
                "IPYTHONDIR": str(own / "ipython"),
                "HOME": str(workspace),
                "HPC_CACHE": str(ctx.cache),  # for hpc.inside.lab: what the runs have made once is not made again
                "SHELL": os.environ.get("SHELL", "/bin/bash"),
            }

        serve(ctx, Server(
            argv=argv, env=env, health="/api/status", path=opened, wish=config.port, ready_s=config.ready_s,
            cwd=workspace,
        ))  # fmt: skip


STAGE = Stage(
    name="jupyter",
    summary="JupyterLab on a node, with the lab's notebooks",
    config=JupyterConfig,
    container="lab",
    consumes={},
    outputs=lambda config: {},
    folders=lambda config: (config.workspace, *config.folders),
    resources=lambda config: Resources(gpus_per_node=config.gpus, cpus_per_task=8, mem_gb=64, time_min=240),
    service=True,
    run=run,
)
