"""bob's project on the test cluster: hpc installed from this checkout, and six stages that each need the one before."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import NotMeasured

ROOT = Path(__file__).resolve().parent.parent
USER = "bob"  # the tests work as alice
STAGES = ("one", "two", "three", "four", "five", "six")
_KINDS = ("dataset", "lora_adapter", "hf_model")
_SITE = """\
extends = "slurm"
partition = "batch"
account = "research"
images = "{images}"
"""
_SETTINGS = """\
site = "bench"
[environments]
train = "{image}"
[pipeline]
stages = {stages}
"""


@dataclass(frozen=True)
class Ground:
    """Where bob works."""

    cluster: Any
    venv: Path
    image: Path
    folder: Path

    @property
    def python(self) -> str:
        return str(self.venv / "bin" / "python")

    @property
    def hpc(self) -> str:
        return str(self.venv / "bin" / "hpc")

    def site(self, **values: Any) -> None:
        """Write the site profile; `values` come on top, as TOML."""
        lines = [f"{name} = {_toml(value)}\n" for name, value in values.items()]
        self.write("sites/bench.toml", _SITE.format(images=self.image.parent) + "".join(lines))

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """A file of bob's in the project."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        for owned in (path, path.parent):
            shutil.chown(owned, USER, USER)
        return path

    def run(self, *argv: str, timeout: float = 300, input: str | None = None) -> str:
        """What a command of bob's on the login node prints."""
        done = self.cluster.run(USER, *argv, cwd=self.folder, timeout=timeout, input=input)
        return str(done.stdout)

    def program(self, name: str, *argv: str, timeout: float = 600, input: str | None = None) -> Any:
        """The JSON that a file of this folder prints, run by bob on the login node with the installed hpc."""
        return json.loads(self.run(self.python, str(self.venv / "bench" / name), *argv, timeout=timeout, input=input))

    def processes(
        self, commands: Mapping[str, Sequence[str]], rounds: int, *, terminal: bool = False
    ) -> dict[str, list[float]]:
        """`measure.processes`, by bob on the login node: without the cost of getting there."""
        asked = {"commands": commands, "rounds": rounds, "cwd": str(self.folder), "terminal": terminal}
        taken: dict[str, list[float]] = self.program("measure.py", input=json.dumps(asked))
        return taken

    def jobs(self) -> list[str]:
        """The ids of the project's jobs that wait or run."""
        listed = self.run("squeue", "-h", "-u", USER, "-t", "PD,R", "-o", "%i|%Z")
        pairs = (line.partition("|") for line in listed.splitlines())
        return [number for number, _, folder in pairs if Path(folder).is_relative_to(self.folder)]

    def cancel(self) -> None:
        """End the project's jobs, and no others."""
        jobs = self.jobs()
        for start in range(0, len(jobs), 500):
            self.run("scancel", *jobs[start : start + 500])


@contextmanager
def ground() -> Iterator[Ground]:
    """A fresh project; afterwards its jobs and files are gone. NotMeasured where there can be no test cluster."""
    if os.geteuid() != 0:
        raise NotMeasured("needs root, for a Slurm cluster on this machine")
    if not (shutil.which("slurmctld") or Path("/usr/sbin/slurmctld").exists()) or not shutil.which("apptainer"):
        raise NotMeasured("needs Slurm and Apptainer on this machine: `make test` installs them")
    sys.path.insert(0, str(ROOT))
    from tests.integration.cluster import Cluster

    cluster = Cluster()
    was_up = cluster.is_up()
    cluster.up()
    venv = _venv(cluster.dir / "bench-venv")
    made = Ground(
        cluster=cluster,
        venv=venv,
        image=cluster.images("base", venv),
        folder=Path(tempfile.mkdtemp(prefix="bench-", dir=f"/home/{USER}")),
    )
    shutil.chown(made.folder, USER, USER)
    made.site()
    made.write("hpc.toml", _SETTINGS.format(image=made.image, stages=json.dumps(STAGES)))
    try:
        yield made
    finally:
        made.cancel()
        shutil.rmtree(made.folder, ignore_errors=True)
        if not was_up:
            cluster.down()


def _venv(venv: Path) -> Path:
    """hpc from a wheel of this checkout, in a venv that everybody can run, with the stages and this folder's files."""
    probe = importlib.import_module("tests.support.probe")
    if not (venv / "bin" / "pip").exists():
        _quiet("/usr/bin/python3", "-m", "venv", venv)  # Debian's: one under root's home is closed to bob
    with tempfile.TemporaryDirectory() as wheels:
        pip = (venv / "bin" / "python", "-m", "pip", "-q")
        _quiet(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT)
        (wheel,) = Path(wheels).glob("*.whl")
        _quiet(*pip, "install", f"{wheel}[images]")
        _quiet(*pip, "install", "--no-deps", "--force-reinstall", wheel)  # the code may change, and the version not
    (stages,) = venv.glob("lib/python*/site-packages/stages")
    for number, name in enumerate(STAGES):
        needed = _KINDS[(number - 1) % 3] if number else None
        probe.write(stages, name, consumes=needed, produces=_KINDS[number % 3])
    shutil.copytree(ROOT / "bench", venv / "bench", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return venv


def _quiet(*argv: str | Path) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, umask=0o022)
    if done.returncode:
        raise SystemExit(f"{argv}: {done.stdout}{done.stderr}")


def _toml(value: Any) -> str:
    """Texts, numbers, lists of them, and tables of them.

    >>> _toml({"hold": True}), _toml(["a"])
    ('{ hold = true }', '["a"]')
    """
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)
