"""A service's successors: queued so that each starts before the limit of the one before, and withdrawn with it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.core import endpoint, rundir
from hpc.core.endpoint import Endpoint
from hpc.core.errors import HpcError, NotFound, UsageError
from hpc.core.plan import Plan, plan
from hpc.core.rundir import StageDir
from hpc.login import succession
from hpc.login.cancel import cancel
from hpc.login.planning import Work
from hpc.login.states import StageState, states
from hpc.login.submit import Submission, prepare, submit
from hpc.node import succession as on_the_node
from tests.core.fakes import FakeFacts, chain, wish

from .test_submit import Cluster


class Serving(Cluster):
    """Its pipeline is one service, which has 60 minutes."""

    successors = 2

    def plan(self, wanted: str = "merge", **prepare: object) -> Plan:
        stage = replace(
            chain()[0], name="serve", consumes={}, service=True, succession=lambda config: (self.successors, 15)
        )
        return plan([wish(stage)], ["serve"], self.site(), FakeFacts())

    def replaced(self) -> Submission:
        work = prepare(self.plan(), self.settings(), "serve", self.scheduler(), replace=True)
        submit(work, self.settings(), self.scheduler(), lambda text: None)
        return work

    def starts(self, folder: StageDir, attempt: int = 1) -> None:
        record = folder.job if attempt == self.current(folder) else folder.attempt(attempt).successor
        job = rundir.read_json(record) or {}
        self.jobs[job["job_id"]]["state"] = "RUNNING"
        rundir.append_event(folder.attempt(attempt).events, "ready")

    def current(self, folder: StageDir) -> int:
        return int((rundir.read_json(folder.job) or {})["attempt"])

    def row(self, work: Submission) -> StageState:
        asked = rundir.read_json(work.run.run)
        assert asked is not None
        (row,) = states([(work.run, asked)], self.scheduler())
        return row


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    return Serving(tmp_path, monkeypatch)


def announced(folder: StageDir, job_id: str) -> None:
    endpoint.write(folder, Endpoint(
        host="dgx01", bound="0.0.0.0", ports={"http": 1}, path="/", health="/h", job_id=job_id, pid=1, ready=5,
    ), "secret")  # fmt: skip


def ended(folder: StageDir, attempt: int, state: str) -> None:
    rundir.write_json(folder.attempt(attempt).outcome, {"state": state, "started": 1, "ended": 2})


def test_each_starts_before_the_limit_of_the_one_before(serving: Serving) -> None:
    work = serving.submit("serve")
    limit = work.placed[0].planned.resources.time_min
    assert serving.submitted == [
        ("serve", None), ("serve", f"after:101+{limit - 15}"), ("serve", f"after:102+{limit - 15}"),
    ]  # fmt: skip
    folder = work.run.stage("serve")
    assert [a.number for a in folder.successors()] == [2, 3]
    assert [serving.jobs[i]["comment"].split(":")[1] for i in serving.jobs] == [f"serve-1/serve/{n}" for n in (1, 2, 3)]
    assert [p.job.takes_over for p in (*work.placed, *work.successors["serve"])] == [False, True, True]
    assert (serving.row(work).job_id, serving.row(work).state) == ("101", "PENDING")


def test_a_dry_run_shows_all_of_them(serving: Serving) -> None:
    work = prepare(serving.plan(), serving.settings(), "serve", serving.scheduler())
    shown = Work(settings=serving.settings(), submission=work).dry_run()
    limit = work.placed[0].planned.resources.time_min - 15
    told = [re.findall(r"^#SBATCH --dependency=(.*)$", stage["script"], re.M) for stage in shown]
    assert told == [[], [f"after:@serve+{limit}"], [f"after:@serve/2+{limit}"]]
    assert serving.submitted == []


def test_the_first_that_is_ready_is_the_services_job(serving: Serving) -> None:
    work = serving.submit("serve")
    folder = work.run.stage("serve")
    serving.starts(folder)
    announced(folder, "101")
    assert (serving.row(work).job_id, serving.row(work).successor) == ("101", "102")
    serving.starts(folder, 2)
    assert serving.row(work).job_id == "101"  # it is not ready
    announced(folder, "102")
    endpoint.take_over(folder, "102")
    endpoint.take_over(folder, "101")  # the one that has it already changes nothing
    assert (serving.row(work).job_id, serving.row(work).successor, serving.row(work).attempt) == ("102", "103", 2)
    endpoint.clear(folder, "101")  # the old one's end
    assert endpoint.read(folder) is not None


def test_where_none_was_ready_in_time_the_next_is_the_services_job(serving: Serving) -> None:
    folder = serving.submit("serve").run.stage("serve")
    endpoint.promote(folder, 1)
    assert serving.current(folder) == 2
    endpoint.promote(folder, 2)
    endpoint.promote(folder, 3)
    assert (serving.current(folder), folder.successors()) == (3, [])


def test_a_job_whose_turn_is_over_or_has_not_come_does_not_start(serving: Serving) -> None:
    folder = serving.submit("serve").run.stage("serve")
    assert [on_the_node.refused(folder, number) for number in (1, 2, 3)] == [None] * 3
    ended(folder, 1, "TIMEOUT")
    assert on_the_node.refused(folder, 2) is None
    ended(folder, 1, "FAILED")
    refused = on_the_node.refused(folder, 2)
    assert refused is not None
    assert (refused.state, "FAILED" in refused.cause) == ("CANCELLED", True)
    endpoint.promote(folder, 1)
    requeued = on_the_node.refused(folder, 1)
    assert requeued is not None
    assert "attempt 2 of this service has taken over" in requeued.cause


def test_cancel_ends_those_that_wait_too(serving: Serving) -> None:
    work = serving.submit("serve")
    cancel(work.run, [serving.row(work)])
    assert {job["state"] for job in serving.jobs.values()} == {"CANCELLED"}
    assert work.run.stage("serve").successors() == []
    again = serving.submit("serve")
    assert (again.run, again.placed[0].attempt) == (work.run, 4)


def test_one_at_once_beside_one_that_runs(serving: Serving) -> None:
    serving.successors = 0
    with pytest.raises(NotFound):
        serving.replaced()
    work = serving.submit("serve")
    folder = work.run.stage("serve")
    serving.starts(folder)
    assert serving.replaced().run == work.run
    assert serving.submitted == [("serve", None), ("serve", None)]
    assert [a.number for a in folder.successors()] == [2]
    serving.replaced()  # once more: the first may hang in the queue
    assert [a.number for a in folder.successors()] == [2, 3]
    with pytest.raises(UsageError):
        succession.refuse(work.plan, "serve", {}, replace(serving.site(), scheduler="local"))


def test_waiting_for_one_ends_with_why_it_never_came(serving: Serving) -> None:
    serving.successors = 0
    work = serving.submit("serve")
    folder = work.run.stage("serve")
    serving.starts(folder)
    (placed,) = serving.replaced().successors["serve"]
    said: list[str] = []
    ended(folder, 2, "FAILED")
    with pytest.raises(HpcError, match="has ended: FAILED"):
        succession.wait(work.run, placed, said.append)
    folder.attempt(2).outcome.unlink()
    endpoint.take_over(folder, "102")
    succession.wait(work.run, placed, said.append)
    assert said == ["serve-1/serve: attempt 2 has taken over"]


def test_where_a_later_one_is_refused_all_are_withdrawn(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = serving._sbatch

    def refuse_the_third(placed: object, dependency: str | None, user: str) -> str:
        if len(serving.jobs) == 2:
            raise HpcError("sbatch: no")
        return sbatch(placed, dependency, user)  # type: ignore[arg-type]

    monkeypatch.setattr("hpc.login.batch.submit_slurm", refuse_the_third)
    with pytest.raises(HpcError, match="sbatch: no"):
        serving.submit("serve")
    assert {job["state"] for job in serving.jobs.values()} == {"CANCELLED"}
