"""The cluster is what the other integration tests take it for."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from .cluster import Cluster

FETCH = "import urllib.request as u; print(u.urlopen('http://dgx03:8888', timeout=3).status)"
EAT = "x = bytearray(900 << 20); import time; time.sleep(20)"


def ended_as(cluster: Cluster, job: str, seconds: float = 30) -> str:
    """The final state in sacct, which lags some seconds behind the job."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = cluster.run("alice", "sacct", "-nPX", "-j", job, "-o", "State").stdout.strip()
        if state not in ("", "PENDING", "RUNNING"):
            return state
        time.sleep(0.5)
    raise AssertionError(f"job {job} did not end in {seconds} s")


def test_every_machine_has_its_own_name(cluster: Cluster) -> None:
    for node in ("laptop", "login", *cluster.nodes):
        assert cluster.run("alice", "hostname", node=node).stdout.strip() == node


def test_laptop_reaches_the_login_node_only(cluster: Cluster, workdir: Path) -> None:
    serve = ("python3", "-m", "http.server", "8888", "--directory", str(workdir))
    quiet = subprocess.DEVNULL
    server = cluster.popen("alice", *serve, node="dgx03", stdout=quiet, stderr=quiet)
    get = ("python3", "-c", FETCH)
    try:
        near = cluster.run("alice", "timeout", "10", "sh", "-c", 'until "$@"; do sleep 0.2; done', "sh", *get)
        assert near.stdout.strip() == "200"
        assert cluster.run("alice", *get, node="laptop", check=False).returncode != 0
        assert cluster.run("alice", "ssh", "login", "hostname", node="laptop").stdout == "login\n"
    finally:
        server.terminate()
        server.wait()


def test_srun_on_two_nodes(cluster: Cluster) -> None:
    names = cluster.run("alice", "srun", "-N2", "--ntasks-per-node=1", "hostname").stdout.split()
    assert len(set(names)) == 2
    assert set(names) <= set(cluster.nodes)


def test_over_its_memory_a_job_ends_out_of_memory(cluster: Cluster, workdir: Path) -> None:
    if "memory=cgroup" not in (cluster.dir / "mode").read_text():
        pytest.skip("no usable cgroup v1 memory controller: Slurm polls, and the state is another")
    script = f"#!/bin/sh\nexec python3 -c '{EAT}'\n"
    job = cluster.run("alice", "sbatch", "--parsable", "--mem=200M", cwd=workdir, input=script).stdout.strip()
    assert ended_as(cluster, job) == "OUT_OF_MEMORY"


def test_a_container_in_a_job_sees_its_gpu(cluster: Cluster, base_sif: Path) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['SLURM_JOB_ID'])"
    inside = ("apptainer", "exec", str(base_sif), "python3", "-c", show)
    device, job = cluster.run("alice", "srun", "--gres=gpu:1", *inside).stdout.split()
    assert device in "01234567"
    assert job.isdigit()


def test_bob_cannot_read_what_is_alices(cluster: Cluster, workdir: Path) -> None:
    cluster.run("alice", "sh", "-c", "echo secret >token; chmod 644 token", cwd=workdir)
    refused = cluster.run("bob", "cat", str(workdir / "token"), check=False)
    assert "Permission denied" in refused.stderr
    assert refused.stdout == ""


@pytest.mark.alone
def test_a_stopped_controller_is_noticed_and_comes_back(cluster: Cluster) -> None:
    cluster.stop("slurmctld")
    try:
        assert "DOWN" in cluster.run("alice", "scontrol", "ping", check=False).stdout
    finally:
        cluster.start("slurmctld")
    assert "UP" in cluster.run("alice", "scontrol", "ping").stdout


@pytest.mark.alone
def test_a_frozen_daemon_hangs_until_it_is_thawed(cluster: Cluster) -> None:
    cluster.freeze("slurmctld")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            cluster.run("alice", "squeue", timeout=2)
    finally:
        cluster.thaw("slurmctld")
    cluster.run("alice", "squeue")


def test_words_reach_a_command_as_they_are(cluster: Cluster) -> None:
    odd = "a 'b' \"c\" $HOME `id` ;\n*"
    assert cluster.run("alice", "printf", "%s", odd, node="dgx02").stdout == odd
