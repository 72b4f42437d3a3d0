"""Fixtures of the integration tests: the cluster, its images, an installed hpc, a folder to work in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import probe

from .cluster import Cluster
from .project import SITE, Project, jobs

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
SELENIUM = "selenium==4.51.0"
NO_ROOT = "INTEGRATION TESTS NOT RUN: the test cluster needs root (namespaces, slurmd, users)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, so that `-m "not integration"` leaves them out."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without root: skip on a laptop, but never go green in CI by skipping."""
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail(NO_ROOT, pytrace=False)
        item.config.stash[_skipped] = True
        pytest.skip("needs root")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say once, where it is seen, that a whole folder was skipped."""
    if config.stash.get(_skipped, False):
        terminalreporter.write_line(NO_ROOT, red=True, bold=True)


_skipped = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, up. It stays up afterwards if it was up before, and where other workers use it."""
    it = Cluster()
    was_up = it.is_up() or "PYTEST_XDIST_WORKER" in os.environ
    it.up()
    yield it
    if not was_up:
        it.down()


@pytest.fixture(scope="session")
def base_sif(cluster: Cluster, hpc_install: Path) -> Path:
    """The image with Debian and Python alone."""
    return cluster.images("base", hpc_install)


@pytest.fixture(scope="session")
def train_sif(cluster: Cluster, hpc_install: Path) -> Path:
    """The image with the training environment."""
    return cluster.images("train", hpc_install)


@pytest.fixture(scope="session")
def lab_sif(cluster: Cluster, hpc_install: Path) -> Path:
    """The image with JupyterLab in the training environment."""
    return cluster.images("lab", hpc_install)


@pytest.fixture(scope="session")
def serve_cpu_sif(cluster: Cluster, hpc_install: Path) -> Path:
    """The image with the real Triton server."""
    return cluster.images("serve-cpu", hpc_install)


@pytest.fixture(scope="session")
def engine_lab_sif(cluster: Cluster, hpc_install: Path) -> Path:
    """The image with JupyterLab in the serving environment."""
    return cluster.images("engine-lab", hpc_install)


@pytest.fixture(scope="session")
def hpc_install(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv that alice and bob can run, with hpc in it, installed from a wheel of this checkout."""
    # HPC_TEST_VENV: several checkouts are tested at once; each worker has a venv, since tests add stages to it
    venv = Path(os.environ.get("HPC_TEST_VENV", f"{cluster.dir}/hpc-venv") + os.environ.get("PYTEST_XDIST_WORKER", ""))
    pip = (venv / "bin" / "python", "-m", "pip", "-q")
    wheels = tmp_path_factory.mktemp("wheel")

    def run(*argv: str | Path) -> None:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, umask=0o022)
        assert done.returncode == 0, done.stdout + done.stderr

    if not (venv / "bin" / "pip").exists():
        # Debian's python: one under root's home could not be run by anybody else
        run("/usr/bin/python3", "-m", "venv", venv)
    run(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, CHECKOUT)
    (wheel,) = wheels.glob("*.whl")
    run(*pip, "install", wheel)
    # once more: the version may be the one that is there, while the code has changed
    run(*pip, "install", "--no-deps", "--force-reinstall", wheel)
    return venv


@pytest.fixture
def workdir(cluster: Cluster) -> Iterator[Path]:
    """A fresh folder of alice's on the file system that all nodes share."""
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/alice"))
    shutil.chown(folder, "alice", "alice")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def probes(hpc_install: Path) -> list[str]:
    """The stages first, second and third, added to the installed hpc as a user would: one file each."""
    (folder,) = hpc_install.glob("lib/python*/site-packages/stages")
    return probe.write_chain(folder)


@pytest.fixture
def project(cluster: Cluster, workdir: Path, hpc_install: Path, base_sif: Path, probes: list[str]) -> Iterator[Project]:
    """A project whose pipeline is the probe stages, in the small image."""
    made = Project(cluster, workdir, hpc_install)
    made.write("sites/slurm-test.toml", SITE.format(images=base_sif.parent))
    made.write(
        "hpc.toml",
        f'site = "slurm-test"\n[environments]\ntrain = "{base_sif}"\n[pipeline]\nstages = {probes}\n'.replace("'", '"'),
    )
    yield made
    left = jobs(made, "%i")
    if left:
        cluster.run("alice", "scancel", *left)


@pytest.fixture(scope="session")
def browser(cluster: Cluster) -> Path:
    """A python with selenium, for tests/support/browser.py; Chromium and its driver are installed."""
    packages = ("chromium", "chromium-driver")
    venv = cluster.dir / "browser-venv"
    with cluster.alone("browser"):
        known = subprocess.run(["dpkg-query", "-W", *packages], check=False, capture_output=True)
        if known.returncode:
            apt = ["apt-get", "-qqy", "-o", "DPkg::Lock::Timeout=600", "install", "--no-install-recommends", *packages]
            done = subprocess.run(apt, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        if not (venv / "bin" / "selenium-is-there").exists():
            for argv in (["/usr/bin/python3", "-m", "venv", venv], [venv / "bin" / "pip", "-q", "install", SELENIUM]):
                done = subprocess.run(argv, check=False, capture_output=True, text=True, umask=0o022)
                assert done.returncode == 0, done.stdout + done.stderr
            (venv / "bin" / "selenium-is-there").touch()
    return venv / "bin" / "python"


@pytest.fixture(scope="session")
def demo_files(cluster: Cluster) -> Path:
    """The demo's folder with its model and data, fetched where they are missing."""
    demo = CHECKOUT / "demo"
    with cluster.alone("demo"):
        done = subprocess.run([sys.executable, demo / "fetch.py"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return demo
