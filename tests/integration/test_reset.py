"""`hpc reset` and `hpc menu` on a real cluster: jobs have ended, what a killed service left goes, the rest stays."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from .project import Project, jobs
from .test_lab import lab
from .test_running import Terminal
from .test_service import door, start
from .test_states import ended, submit

__all__ = ["door", "lab"]


def test_running_service_has_ended_when_reset_returns(door: Project) -> None:
    one = start(door)
    one.ready()
    done = door.hpc("reset", "door", "--yes")
    assert f"{one.run}/door: job {one.row()['job_id']} is cancelled (RUNNING, dgx" in done.stderr
    assert jobs(door) == []
    assert one.row()["state"] == "CANCELLED"
    again = door.hpc("reset", "door")
    assert (again.stdout, again.stderr) == (f"{one.run}/door: nothing to reset\n", "")


def of_job(mark: bytes) -> list[int]:
    """The processes that have the mark in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def kill_at_once(*marks: bytes) -> None:
    """As when the node loses its power: none of them is left to clear up after another."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (pid for mark in marks for pid in of_job(mark)):
            with suppress(ProcessLookupError):  # some end with the one that started them
                os.kill(pid, number)


def test_what_a_killed_service_left_goes(door: Project) -> None:
    one = start(door)
    one.ready()
    job = f"SLURM_JOB_ID={one.row()['job_id']}\0".encode()
    kill_at_once(job)
    assert one.end()["state"] != "COMPLETED"
    left = [one.folder / "endpoint.json", one.folder / "token"]
    assert all(path.exists() for path in left), "else this test proves nothing"
    assert door.hpc("reset", "door", check=False).returncode == 2
    assert sorted(door.json("reset", "door", "--yes")["removed"]) == sorted(map(str, left))
    assert not any(path.exists() for path in left)
    assert (one.folder / "attempt-1" / "stdout").exists()


def test_pipeline_that_waits_is_reset_and_can_be_submitted_again(project: Project) -> None:
    run = submit(project, "pipeline", "--set", "second.seconds=300")
    project.until(lambda f: f["second"]["state"] == "RUNNING", run)
    shown = project.json("reset", run, "--yes")
    assert {c["stage"] for c in shown["cancelled"]} == {"second", "third"}
    assert jobs(project) == []
    states = {name: row["state"] for name, row in project.states(run).items()}
    assert states == {"first": "COMPLETED", "second": "CANCELLED", "third": "CANCELLED"}
    assert submit(project, "first", "--set", "second.seconds=300")
    assert project.until(ended("first"))["first"]["state"] == "COMPLETED"


def test_menu_leads_to_the_real_lab_and_resets_it(lab: Project) -> None:
    menu = Terminal(lab, "menu", env={"TERM": "dumb"})
    menu.until("Choose: ")
    menu.type("1\n")
    menu.until("is ready on dgx", 180)
    menu.until("ENTER for alice): ")
    menu.type("one-time-1\n")
    printed = menu.until("?token=")
    assert "ssh -N -L localhost:" in printed
    assert "-l one-time-1" in printed
    assert "/lab/tree/finetuning-lab.ipynb" in printed
    menu.until("Choose: ", 60)
    (row,) = lab.states().values()
    assert row["phase"] == "ready"
    notebook = lab.folder / "workspace" / "finetuning-lab.ipynb"
    lab.cluster.run("alice", "cp", "/etc/hostname", str(notebook))
    menu.type("1\n")
    menu.until(f"it runs already: {row['run']}/jupyter")
    menu.until("ENTER for alice): ")
    menu.type("\n")
    menu.until("-l alice")
    menu.until("Choose: ", 60)
    menu.type("r\n")
    menu.until("[y/N] ")
    menu.type("y\n")
    menu.until("/jupyter: reset", 120)
    menu.until("Choose: ")
    menu.type("X\n")
    assert menu.end() == 0
    assert jobs(lab) == []
    assert notebook.read_bytes() == Path("/etc/hostname").read_bytes(), "what is mine stays"
