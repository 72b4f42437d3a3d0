"""A user's project folder on the cluster, and `hpc` run in it as she would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cluster import Cluster

SITE = """\
extends = "slurm"
partition = "batch"
account = "research"
gres = "gpu:a100"
images = "{images}"
signal_delay_s = 10
heartbeat_s = 2
"""


@dataclass(frozen=True)
class Project:
    """One folder with hpc.toml and sites/slurm-test.toml."""

    cluster: Cluster
    folder: Path
    venv: Path
    user: str = "alice"

    def write(self, name: str, text: str) -> Path:
        """A file of the user's in the project."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for owned in (path, path.parent):
            shutil.chown(owned, self.user, self.user)
        return path

    def hpc(
        self, *arguments: str, user: str = "", check: bool = True, env: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """`hpc ARGUMENTS` on the login node, in the project's folder."""
        argv = (str(self.venv / "bin" / "hpc"), *arguments)
        return self.cluster.run(user or self.user, *argv, cwd=self.folder, check=check, env=env, timeout=timeout)

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        hpc = str(self.venv / "bin" / "hpc")
        return self.cluster.popen(self.user, hpc, *arguments, cwd=self.folder, stdout=pipe, stderr=pipe)

    def json(self, *arguments: str, check: bool = True) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.hpc(*arguments, "--json", check=check).stdout)
        return document

    def states(self, run: str = "") -> dict[str, dict[str, Any]]:
        """Stage -> its row of `hpc status RUN --json`."""
        rows = self.json("status", *([run] if run else []))["stages"]
        return {row["stage"]: row for row in rows}

    def until(
        self, wanted: Callable[[dict[str, dict[str, Any]]], bool], run: str = "", timeout: float = 120
    ) -> dict[str, dict[str, Any]]:
        """Ask for the states until they are as wanted; AssertionError with the last ones where they never are."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.states(run)
            if wanted(found):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.3)


def holding(folder: Path, text: str) -> list[Path]:
    """The files below it that have this text, but for the one that is to have it; some come and go meanwhile."""
    found = []
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names if name != "token"):
            with suppress(OSError):
                if path.is_file() and text.encode() in path.read_bytes():
                    found.append(path)
    return found


def jobs(project: Project, form: str = "%k") -> list[str]:
    """The project's jobs that wait or run, by their comments."""
    argv = ("squeue", "-h", "-u", project.user, "-t", "PD,R", "-o", f"%Z|{form}")
    lines = (line.partition("|") for line in project.cluster.run(project.user, *argv).stdout.splitlines())
    return [rest for folder, _, rest in lines if Path(folder).is_relative_to(project.folder)]
