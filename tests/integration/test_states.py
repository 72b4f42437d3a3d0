"""`hpc status` is right in every state that a job can be in, with a real slurmctld, slurmdbd and cgroups."""

from __future__ import annotations

import pytest

from hpc.login.states import ACTIVE, UNKNOWN

from .project import Project


def submit(project: Project, *arguments: str) -> str:
    run: str = project.json("submit", *arguments)["run"]
    return run


def ended(*stages: str):  # type: ignore[no-untyped-def]
    return lambda found: all(found[s]["state"] not in {*ACTIVE, UNKNOWN} for s in stages)


def test_pipeline_runs_in_order_and_completes(project: Project) -> None:
    run = submit(project, "pipeline")
    found = project.until(ended("first", "second", "third"), run)
    assert [s["state"] for s in found.values()] == ["COMPLETED"] * 3
    again = project.hpc("submit", "pipeline")
    assert "nothing to do for first (done), second (done), third (done)" in again.stdout
    assert project.states(run).keys() == found.keys()


def test_running_shows_progress_node_and_time(project: Project) -> None:
    run = submit(project, "first", "--set", "first.seconds=40")
    found = project.until(lambda f: f["first"]["state"] == "RUNNING" and (f["first"]["done"] or 0) > 2, run)
    assert found["first"]["node"].startswith("dgx")
    assert found["first"]["message"] == "sleeping"
    assert found["first"]["elapsed_s"] >= 0
    text = project.hpc("status", run).stdout
    assert "RUNNING" in text
    assert "━" in text
    project.hpc("cancel", run)
    found = project.until(ended("first"), run)
    assert found["first"]["state"] == "CANCELLED"
    assert found["first"]["reason"] == "cancelled by hpc cancel"


def test_pending_tells_the_reason_in_words(project: Project) -> None:
    run = submit(project, "pipeline", "--set", "first.seconds=60", "--set", "first.resources.cpus_per_task=2")
    found = project.until(lambda f: f["first"]["state"] == "RUNNING", run)
    assert found["second"]["state"] == "PENDING"
    assert found["second"]["reason"] == "waits for the stage before it"
    project.hpc("cancel", f"{run}/first")
    found = project.until(ended("first", "second", "third"), run)
    assert [s["state"] for s in found.values()] == ["CANCELLED"] * 3, "kill-on-invalid-dep ends those that wait"


def test_failure_tells_cause_and_hint_and_the_rest_is_not_run(project: Project) -> None:
    run = submit(project, "pipeline", "--set", "second.exit_code=1")
    found = project.until(ended("first", "second", "third"), run)
    assert [s["state"] for s in found.values()] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert found["second"]["reason"] == "the probe was told to fail"
    assert found["second"]["hint"] == "tell it not to"
    assert "the probe was told to fail" in project.hpc("logs", run).stdout
    # mended, the run of the same settings goes on where it stopped; with other settings first is taken over
    again = submit(project, "pipeline")
    found = project.until(ended("first", "second", "third"), again)
    assert [s["state"] for s in found.values()] == ["COMPLETED"] * 3
    assert found["first"]["reused"] == run


def test_exit_codes_and_signals_are_told_apart(project: Project) -> None:
    by_code = submit(project, "first", "--set", "first.exit_code=7")
    by_signal = submit(project, "first", "--set", "first.signal=11")
    found = project.until(ended("first"), by_code)["first"]
    assert (found["state"], found["exit_code"]) == ("FAILED", 7)
    assert found["reason"] == "the stage ended with exit code 7"
    found = project.until(ended("first"), by_signal)["first"]
    assert (found["state"], found["exit_code"]) == ("FAILED", 139)
    assert found["reason"] == "the stage was ended by SIGSEGV"


def test_out_of_memory(project: Project) -> None:
    # where Slurm only looks at the memory now and then, it must still be there when it looks
    run = submit(project, "first", "--set", "first.memory_mb=2000", "--set", "first.seconds=60")
    found = project.until(ended("first"), run)["first"]
    assert found["state"] == "OUT_OF_MEMORY"
    assert "1 GiB" in found["reason"] or "memory" in found["reason"]
    assert "mem_gb" in found["hint"]


def test_time_limit_saves_and_resumes(project: Project) -> None:
    settings = ("--set", "first.seconds=75", "--set", "first.checkpoint=true")
    hard = submit(project, "second", "--set", "second.seconds=300", "--time", "1", "--set", "first.message=hard")
    waited = project.hpc("submit", "first", *settings, "--time", "1", "--wait", check=False, timeout=180)
    assert waited.returncode == 8, waited.stderr
    assert "TIMEOUT" in waited.stderr
    found = project.states("first")  # by the stage's name: the latest run that has it
    assert found["first"]["state"] == "TIMEOUT"
    assert found["first"]["resumable"]
    (saved,) = project.folder.glob("runs/*/first/checkpoints/saved")
    run = saved.parts[-4]
    project.hpc("submit", "first", *settings, "--time", "5", "--wait", timeout=180)
    result = project.states(run)["first"]
    assert (result["state"], result["attempt"]) == ("COMPLETED", 2)
    assert '"resumed": true' in (saved.parent.parent / "out" / "result.json").read_text()
    # a stage that does not listen is ended by Slurm, and that is seen too
    found = project.until(ended("second"), hard, timeout=120)
    assert found["second"]["state"] == "TIMEOUT"


def test_cancel_while_it_waits_in_the_queue(project: Project) -> None:
    slots = ("--qos", "slots")  # of which a user runs one job at a time
    runs = submit(project, "first", "--set", "first.seconds=120", *slots)
    project.until(lambda f: f["first"]["state"] == "RUNNING", runs)
    waits = submit(project, "first", "--set", "first.seconds=2", *slots)
    row = project.until(lambda f: f["first"]["reason"] == "your qos allows no more jobs at once", waits)["first"]
    assert row["state"] == "PENDING"
    for one in (waits, runs):
        project.hpc("cancel", one)
        assert project.until(ended("first"), one)["first"]["state"] == "CANCELLED"


def test_another_users_jobs_are_not_shown(project: Project) -> None:
    run = submit(project, "first", "--set", "first.seconds=120")
    project.until(lambda f: f["first"]["state"] == "RUNNING", run)
    project.folder.chmod(0o755)
    shown = project.hpc("status", user="bob")
    assert run not in shown.stdout
    assert "no runs" in shown.stderr
    taken = project.hpc("cancel", user="bob", check=False)
    assert taken.returncode == 7
    assert project.states(run)["first"]["state"] == "RUNNING"
    project.hpc("cancel", run)


@pytest.mark.alone
def test_status_without_accounting_comes_from_the_run_folder(project: Project) -> None:
    run = submit(project, "pipeline", "--set", "second.exit_code=1")
    project.cluster.stop("slurmdbd")
    try:
        found = project.until(ended("first", "second", "third"), run)
        assert [s["state"] for s in found.values()] == ["COMPLETED", "FAILED", "CANCELLED"]
        other = submit(project, "first", "--set", "first.message=no-accounting")
        assert project.until(ended("first"), other)["first"]["state"] == "COMPLETED"
    finally:
        project.cluster.start("slurmdbd")
