"""hpc works from a wheel, from a wheel made of the source archive, as an editable install, and from a bare checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc import __version__

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("hatchling", reason="the build backend is not installed: requirements-dev.txt has it")


def build(kind: str, source: Path, target: Path) -> Path:
    """What the build backend makes of `source`: wheel, sdist or editable."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import hatchling.build as b; print(b.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    return target / done.stdout.splitlines()[-1]


@dataclass(frozen=True)
class Installed:
    """An empty venv with one way of having hpc, used from a folder outside the checkout."""

    python: Path
    cwd: Path

    def run(self, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HPC_"))}
        env = {**env, **({"PYTHONPATH": path} if path else {})}
        return subprocess.run([self.python, *arguments], cwd=self.cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    return next(p for p in folder.iterdir() if p.is_dir())


@pytest.fixture(scope="session", params=["wheel", "sdist-wheel", "editable", "checkout"])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wheel: Path, unpacked: Path
) -> Installed:
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv").glob("lib/python3*/site-packages")
    # hpc's dependencies, from here; a .pth below such a folder is not followed, so our own editable hpc is not in it
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if request.param == "checkout":
        return Installed(python, ROOT)
    made = {
        "wheel": lambda: wheel,
        "sdist-wheel": lambda: build("wheel", unpacked, folder / "dist"),
        "editable": lambda: build("editable", ROOT, folder / "dist"),
    }[request.param]()
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(python), "install", "--no-deps", "--no-index", str(made)]
    subprocess.run(pip, check=True, capture_output=True)
    (folder / "elsewhere").mkdir()
    return Installed(python, folder / "elsewhere")


def test_program_answers(installed: Installed) -> None:
    done = installed.run("-m", "hpc", "--version")
    assert (done.stdout, done.stderr, done.returncode) == (f"hpc {__version__}\n", "", 0)


def test_command_is_on_the_path_of_the_venv(installed: Installed) -> None:
    program = installed.python.parent / "hpc"
    if installed.cwd == ROOT:
        assert not program.exists(), "a bare checkout installs nothing"
    else:
        assert subprocess.run([program, "--version"], capture_output=True, text=True).stdout == f"hpc {__version__}\n"


def test_every_stage_is_found(installed: Installed) -> None:
    done = installed.run("-m", "hpc", "stages")
    assert done.returncode == 0, done.stderr
    names = {p.stem for p in (ROOT / "stages").glob("*.py") if not p.stem.startswith("_")}
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == names


def test_settings_find_the_site_profiles(installed: Installed) -> None:
    code = "from hpc.login.settings import load, locate; print(load(locate(), site='dgx').site)"
    done = installed.run("-c", code)
    assert "scheduler='slurm'" in done.stdout, done.stderr
    assert "gres='gpu:a100'" in done.stdout


def test_containers_are_there(installed: Installed) -> None:
    done = installed.run("-c", "from hpc.core.assets import CONTAINERS; print((CONTAINERS / 'train.def').is_file())")
    assert done.stdout == "True\n", done.stderr


def test_snapshot_of_the_code_runs_by_itself(installed: Installed, tmp_path: Path) -> None:
    """What a job imports is copied from wherever hpc lies, and needs nothing else."""
    done = installed.run(
        "-c", f"import pathlib; from hpc.login import snapshot; snapshot.copy(pathlib.Path({str(tmp_path)!r}))"
    )
    assert done.returncode == 0, done.stderr
    arguments = ("nothing", str(tmp_path / "config.json"), str(tmp_path))
    ran = installed.run("-S", "-m", "hpc.inside.runner", *arguments, path=str(tmp_path))
    assert (ran.stderr, ran.returncode) == ("error: there is no stage 'nothing'\n", 2)


def test_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"hpc", "stages", f"hpc_batch-{__version__}.dist-info"}
    for name in ("hpc/py.typed", "hpc/_assets/templates/sites/local.toml", "hpc/_assets/containers/train.def"):
        assert name in names
    assert not [n for n in names if "__pycache__" in n or "tests" in n]


def test_source_archive_makes_the_same_wheel(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    again = build("wheel", unpacked, tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_source_archive_holds_no_runs_models_or_caches(unpacked: Path) -> None:
    files = [str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()]
    assert not [f for f in files if f.startswith(("runs/", "demo/runs/", "demo/models/")) or "_cache/" in f]
    assert sum((unpacked / f).stat().st_size for f in files) < 5 << 20
