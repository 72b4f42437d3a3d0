"""`hpc reset`: says what it takes away, asks, takes it away, and nothing else; a second time there is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from hpc.node.enter import process_start
from tests.support import serving
from tests.support.terminal import CONTROLLING, Terminal

from .test_local import Local, local, packages, until

__all__ = ["local", "packages"]


@pytest.fixture
def door(local: Local, packages: Path) -> Local:
    serving.write(packages / "stages")
    return local


def on_terminal(local: Local, *arguments: str, **env: str) -> Terminal:
    argv = [sys.executable, "-c", CONTROLLING, sys.executable, "-m", "hpc", *arguments]
    own = local.env(XDG_STATE_HOME=str(local.folder / "state"), **env)
    made = Terminal(partial(subprocess.Popen, argv, cwd=local.folder, env=own, start_new_session=True))
    local.started.append(made.process)
    return made


def content(folder: Path) -> dict[str, bytes]:
    """Every file below, without the runs' own records of a stage that ends."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_running_service_is_ended_and_the_second_time_there_is_nothing(door: Local) -> None:
    door.hpc("submit", "door", "--wait")
    pid = door.read("door-1/door/endpoint.json")["pid"]
    done = door.hpc("reset", "door", "--yes")
    assert "door-1/door: job" in done.stderr
    assert "is cancelled (RUNNING" in done.stderr
    assert "door-1/door: reset" in done.stdout
    assert door.states() == {"door": "CANCELLED"}
    assert process_start(pid) is None
    again = door.hpc("reset", "door")  # nobody is asked where there is nothing to do
    assert (again.stdout, again.stderr) == ("door-1/door: nothing to reset\n", "")


def test_what_a_dead_service_left_goes_and_all_else_stays(door: Local) -> None:
    door.hpc("submit", "door", "--wait")
    door.hpc("cancel", "door-1")
    until(lambda: door.states() == {"door": "CANCELLED"}, "cancelled")
    folder = door.folder / "runs/door-1/door"
    for name in ("checkpoints/saved", "out/model/weights"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("work of hours")
    (door.folder / "workspace").mkdir()
    (door.folder / "workspace/lab.ipynb").write_text("mine")
    before = content(door.folder)
    left = [folder / "endpoint.json", folder / "token", folder / ".token.17.part"]
    for path in left:
        path.write_text("{}")
    for path in (folder / "out/.model-x1y2z3.part", folder / "prepare.part"):
        path.mkdir()
        (path / "half").write_text("half")
        left.append(path)
    shown = door.json("reset", "door", "--yes")
    assert shown["schema"] == "hpc.reset/1"
    assert (shown["run"], shown["cancelled"]) == ("door-1", [])
    assert sorted(shown["removed"]) == sorted(map(str, left))
    assert content(door.folder) == before
    assert door.json("reset", "door")["removed"] == []


def test_without_a_terminal_it_changes_nothing_unless_told(door: Local) -> None:
    door.hpc("submit", "door", "--wait")
    for options in ((), ("--json",)):
        done = door.hpc("reset", "door-1", *options, code=2)
        assert "try: hpc reset door-1 --yes" in done.stderr
    assert door.states() == {"door": "RUNNING"}


def test_on_a_terminal_it_asks(door: Local) -> None:
    door.hpc("submit", "door", "--wait")
    for answer in ("n\n", "\n", "\x04"):
        asked = on_terminal(door, "reset", "door")
        assert "is cancelled (RUNNING" in asked.until("[y/N] ")
        asked.type(answer)
        asked.until("nothing was changed")
        assert asked.end() == 0
    assert door.states() == {"door": "RUNNING"}
    asked = on_terminal(door, "reset", "door", TERM="dumb")
    asked.until("[y/N] ")
    asked.type("y\n")
    asked.until("door-1/door: reset")
    assert asked.end() == 0
    assert door.states() == {"door": "CANCELLED"}


def test_stage_alone_is_the_run_that_is_at_work_even_an_earlier_one(door: Local) -> None:
    door.hpc("submit", "door", "--wait")
    door.hpc("submit", "door", "--set", "door.fail=no", "--wait", code=1)
    done = door.hpc("reset", "door", "--yes")
    assert "door-1/door: reset" in done.stdout
    assert door.states("door-1") == {"door": "CANCELLED"}
    assert door.hpc("reset", "door").stdout == "door-2/door: nothing to reset\n"


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [("door", 7, "no run has a stage 'door'"), ("doo", 7, "there is no run 'doo'"), ("first-9", 7, "no run 'first-9'")],
)
def test_what_is_not_there(door: Local, target: str, code: int, said: str) -> None:
    assert said in door.hpc("reset", target, "--yes", code=code).stderr


def test_pipeline_is_reset_whole_and_its_results_stay(local: Local) -> None:
    local.hpc("submit", "first", "--wait")
    manifest = (local.folder / "runs/first-1/first/manifest.json").read_bytes()
    local.hpc("submit", "pipeline", "--set", "second.seconds=60")
    until(lambda: local.states("pipeline-2").get("second") == "RUNNING", "running")
    done = local.hpc("reset", "pipeline-2", "--yes")
    assert done.stderr.count("is cancelled") == 2
    assert local.states("pipeline-2") == {"first": "COMPLETED", "second": "CANCELLED", "third": "CANCELLED"}
    assert (local.folder / "runs/first-1/first/manifest.json").read_bytes() == manifest
    assert os.listdir(local.folder / "runs/first-1/first/out")
