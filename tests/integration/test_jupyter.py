"""The way of a person: submit, tunnel, browser, a cell. Slurm, ssh, JupyterLab and Chromium are real."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .cluster import Cluster
from .conftest import CHECKOUT
from .project import SITE, Project, holding
from .test_service import http
from .test_states import ended
from .test_tunnel import until
from .tunnels import opened, wish


@pytest.fixture(scope="module")
def jupyter(cluster: Cluster, hpc_install: Path, lab_sif: Path) -> Iterator[Project]:
    """A project of alice's whose JupyterLab runs."""
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir="/home/alice"))
    shutil.chown(folder, "alice", "alice")
    made = Project(cluster, folder, hpc_install)
    made.write("sites/slurm-test.toml", SITE.format(images=lab_sif.parent) + 'login_host = "login"\n')
    made.write(
        "hpc.toml", 'site = "slurm-test"\n[jupyter]\ngpus = 1\n[jupyter.resources]\ncpus_per_task = 1\nmem_gb = 2\n'
    )
    made.hpc("submit", "jupyter", "--wait", timeout=180)
    yield made
    made.hpc("cancel", "jupyter")
    made.until(ended("jupyter"))
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def tunnel(jupyter: Project) -> Iterator[dict[str, Any]]:
    """What `hpc tunnel` says, and its first step done on the laptop."""
    document = jupyter.json("tunnel", "jupyter")
    with opened(jupyter.cluster, document["command"]):
        yield document


def test_a_cell_runs_in_the_browser_of_the_laptop(
    jupyter: Project, tunnel: dict[str, Any], browser: Path, workdir: Path
) -> None:
    picture = workdir / "picture.png"
    program = shutil.copy(CHECKOUT / "tests" / "support" / "browser.py", workdir)
    shown = jupyter.cluster.run(
        "alice", str(browser), str(program), tunnel["url"], str(picture), node="laptop", timeout=120
    )
    assert shown.stdout.strip() == "six times seven is 42"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    shutil.copy(picture, jupyter.cluster.dir / "jupyter.png")  # for docs/


def test_nobody_else_gets_in(jupyter: Project, tunnel: dict[str, Any]) -> None:
    """Another user of the node: no answer without the token, no port of a kernel, no file, no argument with it."""
    node, port, token = tunnel["node"], tunnel["ports"]["http"], tunnel["token"]
    cluster = jupyter.cluster
    kernels = f"http://{node}:{port}/api/kernels"
    started = cluster.run(
        "alice", "curl", "-s", "-X", "POST", "-K", "-", "-d", "{}", kernels,
        input=f'header = "Authorization: Bearer {token}"\n',
    )  # fmt: skip
    assert json.loads(started.stdout)["name"] == "python3"
    for place in (node, "login"):
        for path in ("/api/kernels", "/api/contents", "/api/terminals"):
            assert http(jupyter, f"http://{node}:{port}{path}", user="bob", node=place) == "403"
    assert token not in cluster.run("bob", "ps", "-eww", "-o", "args", node=node).stdout
    runtimes = [p for p in Path("/tmp").glob("hpc-jupyter-*") if p.owner() == "alice"]
    assert runtimes
    for runtime in runtimes:  # sockets of the kernels
        assert cluster.run("bob", "ls", str(runtime), node=node, check=False).returncode != 0
    assert holding(jupyter.folder, token) == []


def test_an_open_tab_outlives_a_requeue(jupyter: Project, browser: Path, workdir: Path) -> None:
    """The job moves to another node; the tunnel follows, and the tab that is open is let in without a new address."""
    hpc, pipe, (option, port) = str(jupyter.venv / "bin" / "hpc"), subprocess.PIPE, wish()
    follows = jupyter.cluster.popen(
        "alice", hpc, "tunnel", "--via", f"login:{jupyter.folder}", option, port, node="laptop",
        env={"HPC_REMOTE": hpc}, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
    )  # fmt: skip
    sign, picture = workdir / "open", workdir / "picture.png"
    program = shutil.copy(CHECKOUT / "tests" / "support" / "browser.py", workdir)
    try:
        assert follows.stdout is not None
        assert follows.stderr is not None
        url = follows.stdout.readline().strip()
        assert url.startswith(f"http://localhost:{port}/lab?token=")
        # reset: without what the last test has left open
        argv = (str(browser), str(program), f"{url}&reset", str(picture), "", str(sign))
        tab = jupyter.cluster.popen("alice", *argv, node="laptop", stdout=pipe, stderr=pipe)
        until(sign.exists, "the page is there", 60)
        row = jupyter.states()["jupyter"]
        job = ("update", f"jobid={row['job_id']}", f"ExcNodeList={row['node']}")
        jupyter.cluster.run("alice", "scontrol", "requeue", str(row["job_id"]))
        jupyter.until(lambda f: f["jupyter"]["state"] == "PENDING")
        jupyter.cluster.run("alice", "scontrol", *job, "StartTime=now")
        while "is ready again on" not in (line := follows.stderr.readline()):
            assert line, "the tunnel has ended"
        assert row["node"] not in line
        sign.unlink()
        out, err = tab.communicate(timeout=120)
        assert out.strip() == "six times seven is 42", err
    finally:
        sign.unlink(missing_ok=True)
        follows.send_signal(signal.SIGTERM)
        out, _ = follows.communicate(timeout=20)
    assert out == "", "no other address was shown"
