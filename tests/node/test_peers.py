"""Of several nodes the one that failed first tells why."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest

from hpc.core import rundir
from hpc.node import peers
from hpc.node.outcome import Outcome


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_WAIT_S", 0.3)


def attempt(tmp_path: Path, cause: str, *, ended: float | None = None, state: str = "FAILED") -> rundir.AttemptDir:
    """An attempt whose second node ended so."""
    made = rundir.AttemptDir(tmp_path)
    made.of_task(1).path.mkdir()
    end = {**asdict(Outcome(state=state, exit_code=1, cause=cause)), "host": "dgx02", "ended": ended or time.time()}
    rundir.write_json(made.of_task(1).outcome, end)
    return made


LOST = Outcome(state="FAILED", exit_code=1, cause="RuntimeError: [gloo] Connection closed by peer [10.0.0.2]:41")


def test_a_lost_connection_is_told_as_the_failure_of_the_other_node(tmp_path: Path) -> None:
    end = peers.first(LOST, attempt(tmp_path, "the stage was ended by SIGKILL"), 2, time.time() - 9)
    assert end.cause == "on dgx02: the stage was ended by SIGKILL"


@pytest.mark.parametrize(
    ("cause", "ended", "state"),
    [("", 5.0, "FAILED"), ("NCCL error", None, "FAILED"), ("", None, "COMPLETED")],
    ids=["of an earlier start", "it lost its connection too", "it has not failed"],
)
def test_else_its_own(tmp_path: Path, cause: str, ended: float | None, state: str) -> None:
    assert peers.first(LOST, attempt(tmp_path, cause, ended=ended, state=state), 2, time.time() - 9) == LOST


def test_its_own_error_is_not_replaced(tmp_path: Path) -> None:
    own = Outcome(state="FAILED", exit_code=1, cause="the loss became nan at step 3: the training has diverged")
    assert peers.first(own, attempt(tmp_path, "the stage was ended by SIGKILL"), 2, time.time() - 9) == own
