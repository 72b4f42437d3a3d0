"""A service on this machine, by the real command line: waited for, shown, not started twice, started again."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hpc.inside.service import answers
from tests.support import serving

from .test_local import Local, local, packages, until

__all__ = ["local", "packages"]


@pytest.fixture
def door(local: Local, packages: Path) -> Local:
    serving.write(packages / "stages")
    return local


def test_from_ready_to_ended_to_started_again(door: Local) -> None:
    waited = door.hpc("submit", "door", "--wait")
    assert "door-1/door is ready on" in waited.stderr
    assert "hpc tunnel door-1/door" in waited.stderr
    (row,) = door.json("status")["stages"]
    where = door.read("door-1/door/endpoint.json")
    assert (row["state"], row["phase"]) == ("RUNNING", "ready")
    assert row["endpoint"] == f"{where['host']}:{where['ports']['http']}"
    token = (door.folder / "runs/door-1/door/token").read_text()
    address = f"http://127.0.0.1:{where['ports']['http']}"
    assert where["bound"] == "127.0.0.1"
    assert answers(f"{address}/health", token)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address}/health")

    again = door.hpc("submit", "door")
    assert "nothing to do for door (RUNNING" in again.stdout
    door.hpc("cancel", "door-1")
    until(lambda: door.states() == {"door": "CANCELLED"}, "cancelled")
    assert not (door.folder / "runs/door-1/door/token").exists()

    submitted = json.loads(door.hpc("submit", "door", "--wait", "--json").stdout)
    assert [(s["run"], s["attempt"], s["phase"]) for s in submitted["stages"]] == [("door-1", 2, "ready")]
    door.hpc("cancel", "door-1")
    until(lambda: door.states() == {"door": "CANCELLED"}, "cancelled")


def test_service_that_ended_by_itself_is_no_result_that_is_taken_over(door: Local) -> None:
    door.hpc("submit", "door", "--wait")
    where = door.read("door-1/door/endpoint.json")
    token = (door.folder / "runs/door-1/door/token").read_text()
    assert not answers(f"http://127.0.0.1:{where['ports']['http']}/leave", token)
    until(lambda: door.states() == {"door": "COMPLETED"}, "completed")
    plan = door.json("plan", "door")
    assert plan["stages"][0]["action"] == "submit again (attempt 2)"
    shown = door.json("submit", "door", "--dry-run")
    assert [s["stage"] for s in shown["stages"]] == ["door"]
