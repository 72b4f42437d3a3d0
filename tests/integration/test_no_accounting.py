"""A Slurm without accounting: every outcome comes from the run folders and from what slurmctld remembers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .cluster import Cluster
from .project import Project
from .test_states import ended, submit

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True, scope="module")
def no_accounting(cluster: Cluster) -> Iterator[None]:
    """The cluster without slurmdbd, and as it was again afterwards."""
    cluster.down()
    os.environ["HPC_CLUSTER_ACCOUNTING"] = "none"
    try:
        cluster.up()
        yield
        cluster.down()
    finally:
        del os.environ["HPC_CLUSTER_ACCOUNTING"]
        cluster.up()


def test_states_are_right_without_accounting(project: Project) -> None:
    toml = project.folder / "sites" / "slurm-test.toml"
    project.write("sites/slurm-test.toml", toml.read_text().replace('account = "research"\n', ""))
    run = submit(project, "pipeline", "--set", "second.exit_code=1")
    memory = submit(project, "first", "--set", "first.memory_mb=2000", "--set", "first.seconds=60")
    cancelled = submit(project, "first", "--set", "first.seconds=60")
    project.until(lambda f: f["first"]["state"] == "RUNNING", cancelled)
    project.hpc("cancel", cancelled)
    killed = submit(project, "first", "--set", "first.seconds=61")
    job = project.until(lambda f: f["first"]["state"] == "RUNNING", killed)["first"]["job_id"]
    project.cluster.run("alice", "scancel", "-s", "KILL", "-f", job)  # nobody is left to write an outcome

    found = project.until(ended("first", "second", "third"), run)
    assert [s["state"] for s in found.values()] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert project.until(ended("first"), memory)["first"]["state"] == "OUT_OF_MEMORY"
    assert project.until(ended("first"), cancelled)["first"]["state"] == "CANCELLED"
    assert project.until(ended("first"), killed)["first"]["state"] in {"FAILED", "CANCELLED"}

    doctor = project.hpc("doctor").stdout
    assert "accounting storage is disabled" in doctor
    assert "outcomes come from the run folders" in doctor


def test_a_job_that_slurm_forgot_without_a_trace_is_lost_and_can_be_submitted_again(project: Project) -> None:
    toml = project.folder / "sites" / "slurm-test.toml"
    project.write("sites/slurm-test.toml", toml.read_text().replace('account = "research"\n', ""))
    settings = ("first", "--set", "first.sbatch={hold = true}")
    run = submit(project, *settings)
    assert project.states(run)["first"]["state"] == "PENDING"
    project.cluster.down()
    project.cluster.forget_jobs()
    project.cluster.up()
    assert project.states(run)["first"]["state"] == "LOST"
    # job ids have started again: another job now has the number that the lost one had
    again = project.hpc("submit", *settings)
    assert "submitted" in again.stdout
    found = project.states(run)["first"]
    assert (found["state"], found["attempt"]) == ("PENDING", 2)
