"""JupyterLab as a service, for one user: its workspace, how it is started, and what it is told. Shared by the labs."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from hpc.core import rundir
from hpc.core.assets import TEMPLATES
from hpc.core.stage import Context
from hpc.inside.service import Server, fill, serve


def run(ctx: Context, *, folder: str, notebook: str, port: int, idle_min: int, ready_s: int) -> None:
    """Show the folder, filled with the labs' notebooks where it lacks them, until it is ended.

    `notebook` is opened first; "" is the launcher. `port` is a wish, 0 none; `idle_min` = 0 never ends it.
    """
    workspace = Path(folder)
    opened = f"/lab/tree/{quote(notebook)}" if notebook else "/lab"
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
                f"--ServerApp.shutdown_no_activity_timeout={idle_min * 60}",
                f"--MappingKernelManager.cull_idle_timeout={idle_min * 60}",
                "--LabApp.extension_manager=readonly",  # the image cannot be written
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                *(["--allow-root"] if os.getuid() == 0 else []),
            ]  # fmt: skip

        def env(token: str) -> Mapping[str, str]:
            # cookies are signed with it: those of a tab that is open stay good where the job is requeued
            signs = hashlib.sha256(f"cookies of {token}".encode()).hexdigest()
            rundir.write_text(Path(runtime) / "jupyter_cookie_secret", signs, mode=0o600)
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
            argv=argv, env=env, health="/api/status", path=opened, wish=port, ready_s=ready_s, cwd=workspace,
        ))  # fmt: skip
