"""Where a stage stands, told from the run's files, one squeue and at most one sacct."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc.core import endpoint, rundir
from hpc.core.endpoint import Endpoint
from hpc.core.errors import RuntimeUnavailable
from hpc.core.rundir import AttemptDir, RunDir, RunsDir, StageDir
from hpc.login import view
from hpc.login.cancel import cancel
from hpc.login.states import ACTIVE, LOST, NOT_SUBMITTED, REASONS, UNKNOWN, Scheduler, StageState, states
from hpc.node.enter import process_start

NOW = 1_700_000_000


class World:
    """A runs folder, and Slurm's programs as functions that count how often they are asked."""

    def __init__(self, folder: Path) -> None:
        self.runs = RunsDir(folder)
        self.queue: list[str] = []
        self.records: list[str] = []
        self.down: set[str] = set()
        self.asked: list[str] = []

    def __call__(self, argv: Sequence[str]) -> str:
        self.asked.append(argv[0])
        if argv[0] in self.down:
            raise RuntimeUnavailable(f"{argv[0]}: Unable to contact slurm controller")
        return "\n".join({"squeue": self.queue, "sacct": self.records}[argv[0]]) + "\n"

    def run(self, name: str = "pipeline-1", *stages: str) -> RunDir:
        run = RunDir(self.runs.path / name)
        run.path.mkdir(parents=True)
        keys = {s: f"key-{s}" for s in stages or ("first",)}
        rundir.write_json(run.run, {"run": name, "uid": os.getuid(), "keys": keys, "created": NOW})
        return run

    def job(self, run: RunDir, stage: str = "first", **values: Any) -> StageDir:
        """The stage as it is once it was submitted as job 7."""
        folder = run.stage(stage)
        folder.attempt(values.get("attempt", 1)).path.mkdir(parents=True, exist_ok=True)
        usual = {
            "attempt": 1,
            "status": "submitted",
            "scheduler": "slurm",
            "job_id": "7",
            "comment": f"hpc:{run.id}/{stage}",
            "submitted": NOW,
            "limit_min": 60,
            "after": [],
        }
        rundir.write_json(folder.job, {**usual, **values})
        return folder

    def shows(self, state: str, job_id: str = "7", reason: str = "None", **values: Any) -> None:
        """squeue has the job in this state."""
        usual = {"start": NOW, "node": "dgx01", "comment": "hpc:pipeline-1/first", **values}
        self.queue.append(
            f"{job_id}|{state}|{reason}|{usual['start']}|{NOW}|1:00:00|{usual['node']}|{usual['comment']}"
        )

    def accounts(self, state: str, job_id: str = "7", submit: int = NOW, start: str = str(NOW)) -> None:
        """sacct has the job in this state."""
        self.records.append(f"{job_id}|{state}|0:0|{submit}|{start}|{NOW + 9}|dgx01")

    def all(self) -> list[StageState]:
        return states(self.runs.runs(), Scheduler(user="alice", call=self))

    def one(self) -> StageState:
        (state,) = self.all()
        return state


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def ended(attempt: AttemptDir, state: str, **values: Any) -> None:
    """The node wrote this outcome."""
    usual = {"state": state, "started": NOW, "ended": NOW + 30, "host": "dgx02", "exit_code": 1, "cause": "why"}
    rundir.write_json(attempt.outcome, {**usual, **values})


# ---- before there is a job


def test_stage_without_a_job_is_not_submitted(world: World) -> None:
    world.run()
    assert (world.one().state, world.one().attempt) == (NOT_SUBMITTED, 0)
    assert world.asked == [], "nothing to ask Slurm for"


def test_result_of_another_run_is_completed(world: World) -> None:
    folder = world.job(world.run())
    rundir.write_json(folder.job, {"stage": "first", "reused": "first-9"})
    other = RunDir(world.runs.path / "first-9").stage("first")
    other.path.mkdir(parents=True)
    rundir.write_json(other.manifest, {"key": "key-first"})
    found = world.one()
    assert (found.state, found.reused, found.reason) == ("COMPLETED", "first-9", "taken from first-9")


def test_submission_that_was_killed_before_sbatch_is_not_submitted(world: World) -> None:
    world.job(world.run(), status="submitting", job_id=None)
    assert (world.one().state, world.one().attempt) == (NOT_SUBMITTED, 1)


def test_submission_that_was_killed_after_sbatch_is_found_by_its_comment(world: World) -> None:
    world.job(world.run(), status="submitting", job_id=None)
    world.shows("RUNNING", job_id="99")
    assert (world.one().state, world.one().job_id) == ("RUNNING", "99")


def test_job_file_that_is_not_whole_is_none(world: World) -> None:
    rundir.write_json(world.job(world.run()).job, {"status": "submitted", "scheduler": "slurm", "job_id": "7"})
    assert (world.one().state, world.one().attempt) == (NOT_SUBMITTED, 0)


# ---- live jobs


@pytest.mark.parametrize("state", sorted(ACTIVE))
def test_live_job_has_slurms_word(world: World, state: str) -> None:
    world.job(world.run())
    world.shows(state)
    assert world.one().state == state
    assert world.one().active


@pytest.mark.parametrize(("reason", "words"), [*REASONS.items(), ("SomethingNew", "SomethingNew")])
def test_waiting_job_tells_the_reason_in_words(world: World, reason: str, words: str) -> None:
    world.job(world.run())
    world.shows("PENDING", reason=reason, start="N/A", node="")
    assert (world.one().reason, world.one().elapsed_s, world.one().limit_min) == (words, None, 60)


def test_running_job_tells_place_time_and_progress(world: World) -> None:
    attempt = world.job(world.run()).attempt(1)
    rundir.append_event(attempt.events, "running", done=3, total=10, message="training", loss=0.12345)
    rundir.append_event(attempt.events, "stopping", signal="SIGUSR2")
    world.shows("RUNNING", start=int(time.time()) - 60)
    found = world.one()
    assert (found.node, found.done, found.total, found.phase) == ("dgx01", 3, 10, "stopping")
    assert found.message == "training, loss 0.123"
    assert 59 < (found.elapsed_s or 0) < 70


def test_image_on_its_way_to_the_node_is_told_until_the_stage_begins(world: World) -> None:
    attempt = world.job(world.run()).attempt(1)
    world.shows("RUNNING")
    rundir.append_event(attempt.events, "starting", host="dgx01")
    rundir.append_event(attempt.events, "staging", done=0, total=0, message="another job of this node copies the image")
    assert view.progress(world.one()) == "staging  another job of this node copies the image"
    rundir.append_event(attempt.events, "staging", done=0, total=100, message="waits for its turn to copy the image")
    assert view.progress(world.one()) == "staging  waits for its turn to copy the image"
    rundir.append_event(attempt.events, "staging", done=62, total=100, message="1.1 GB/s")
    assert view.progress(world.one()) == "staging ━━━━━━━─────  62%  1.1 GB/s"
    rundir.append_event(attempt.events, "starting", message="the image is on this node")
    assert view.progress(world.one()) == "starting  the image is on this node"
    rundir.append_event(attempt.events, "running", message="")
    assert view.progress(world.one()) == "running"


def test_requeued_job_is_what_slurm_says_and_not_its_old_outcome(world: World) -> None:
    ended(world.job(world.run()).attempt(1), "PREEMPTED")
    world.shows("PENDING", reason="BeginTime")
    assert (world.one().state, world.one().reason) == ("PENDING", "starts again in a moment")


# ---- ended jobs


def test_outcome_of_the_node_is_the_end(world: World) -> None:
    ended(world.job(world.run()).attempt(1), "FAILED", exit_code=3, hint="do", resumable=True)
    found = world.one()
    assert (found.state, found.reason, found.hint, found.exit_code) == ("FAILED", "why", "do", 3)
    assert (found.node, found.elapsed_s, found.resumable) == ("dgx02", 30, True)
    assert "sacct" not in world.asked, "the files tell it all"


def test_outcome_without_times_has_no_duration(world: World) -> None:
    rundir.write_json(world.job(world.run()).attempt(1).outcome, {"state": "FAILED"})
    assert (world.one().state, world.one().elapsed_s) == ("FAILED", None)


def test_completed_needs_its_manifest(world: World) -> None:
    folder = world.job(world.run())
    ended(folder.attempt(1), "COMPLETED", exit_code=0)
    assert world.one().state == "FAILED"
    rundir.write_json(folder.manifest, {"key": "key-first"})
    assert world.one().state == "COMPLETED"


@pytest.mark.parametrize("state", ["TIMEOUT", "OUT_OF_MEMORY", "PREEMPTED", "NODE_FAIL"])
def test_definite_word_of_slurm_counts_more_than_the_nodes_guess(world: World, state: str) -> None:
    ended(world.job(world.run()).attempt(1), "CANCELLED")
    world.shows(state)
    assert world.one().state == state


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
def test_vague_word_of_slurm_counts_less_than_the_nodes(world: World, state: str) -> None:
    ended(world.job(world.run()).attempt(1), "TIMEOUT")
    world.shows(state)
    assert world.one().state == "TIMEOUT"


def test_completed_stays_completed_whatever_slurm_says(world: World) -> None:
    folder = world.job(world.run())
    ended(folder.attempt(1), "COMPLETED")
    rundir.write_json(folder.manifest, {"key": "key-first"})
    world.shows("TIMEOUT")
    assert world.one().state == "COMPLETED"


ENDS = [
    ("TIMEOUT", "the time limit was reached", True),
    ("NODE_FAIL", "its node failed", True),
    ("PREEMPTED", "a job of higher priority took its place", True),
    ("OUT_OF_MEMORY", "it needed more host memory than was asked for", False),
    ("CANCELLED", "cancelled before it began: by hand, or because its input failed", False),
    ("BOOT_FAIL", "", False),
]


@pytest.mark.parametrize(("state", "reason", "resumable"), ENDS)
@pytest.mark.parametrize("source", ["squeue", "sacct"])
def test_end_without_an_outcome_is_slurms(world: World, source: str, state: str, reason: str, resumable: bool) -> None:
    world.job(world.run())
    if source == "squeue":
        world.shows(state)
    else:
        world.accounts(f"{state} by 1002" if state == "CANCELLED" else state)
    assert (world.one().state, world.one().reason, world.one().resumable) == (state, reason, resumable)


@pytest.mark.parametrize("source", ["squeue", "sacct"])
def test_completed_without_an_outcome_is_a_result_only_with_its_manifest(world: World, source: str) -> None:
    folder = world.job(world.run())
    (world.shows if source == "squeue" else world.accounts)("COMPLETED")
    found = world.one()
    assert (found.state, found.reason, found.hint) == (
        "FAILED", "it ended without writing its outcome", "submit again",
    )  # fmt: skip
    rundir.write_json(folder.manifest, {"key": "key-first"})
    assert (world.one().state, world.one().reason) == ("COMPLETED", "")


def test_job_that_was_cancelled_after_it_began_says_no_more_than_that(world: World) -> None:
    rundir.append_event(world.job(world.run()).attempt(1).events, "starting")
    world.shows("CANCELLED")
    assert world.one().reason == "cancelled"


@pytest.mark.parametrize("state", ["CANCELLED", "FAILED"])
def test_end_that_hpc_cancel_asked_for_is_cancelled(world: World, state: str) -> None:
    rundir.write_json(world.job(world.run()).attempt(1).stop, {})
    world.shows(state)
    assert (world.one().state, world.one().reason) == ("CANCELLED", "cancelled by hpc cancel")


def test_failure_whose_batch_log_tells_of_memory_is_out_of_memory(world: World) -> None:
    attempt = world.job(world.run()).attempt(1)
    attempt.scheduler.mkdir()
    (attempt.scheduler / "7_0_log.err").write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0\n")
    world.shows("FAILED")
    assert world.one().state == "OUT_OF_MEMORY"


# ---- jobs that Slurm has forgotten, or never had


def test_job_that_nobody_knows_is_lost(world: World) -> None:
    world.job(world.run())
    assert (world.one().state, world.one().hint) == (LOST, "submit again: what is done stays done")


def test_job_that_nobody_knows_but_we_cancelled_is_cancelled(world: World) -> None:
    rundir.write_json(world.job(world.run()).attempt(1).stop, {})
    assert world.one().state == "CANCELLED"


def test_id_that_a_restarted_controller_gave_to_another_job_is_not_ours(world: World) -> None:
    world.job(world.run())
    world.shows("RUNNING", comment="hpc:other-1/first")
    assert world.one().state == LOST


def test_old_record_of_the_same_id_is_not_ours(world: World) -> None:
    world.job(world.run())
    world.accounts("COMPLETED", submit=NOW - 86400)
    assert world.one().state == LOST


def test_record_may_be_some_seconds_older_than_our_clock(world: World) -> None:
    world.job(world.run())
    world.accounts("TIMEOUT", submit=NOW - 3)
    assert world.one().state == "TIMEOUT"


def test_accounting_that_lags_behind_is_not_believed(world: World) -> None:
    world.job(world.run())
    world.accounts("RUNNING")
    assert world.one().state == LOST


def test_without_accounting_the_files_still_tell(world: World) -> None:
    world.down = {"sacct"}
    run = world.run("pipeline-1", "first", "second")
    ended(world.job(run, "first").attempt(1), "FAILED")
    world.job(run, "second")
    assert [s.state for s in world.all()] == ["FAILED", LOST]


def test_while_slurm_is_down_the_files_tell_and_the_rest_is_unknown(world: World) -> None:
    world.down = {"squeue", "sacct"}
    run = world.run("pipeline-1", "first", "second")
    ended(world.job(run, "first").attempt(1), "TIMEOUT")
    world.job(run, "second")
    scheduler = Scheduler(user="alice", call=world)
    found = states(world.runs.runs(), scheduler)
    assert [s.state for s in found] == ["TIMEOUT", UNKNOWN]
    assert isinstance(scheduler.problem, RuntimeUnavailable)
    assert world.asked == ["squeue"]


# ---- how often Slurm is asked


def test_500_jobs_cost_one_squeue_and_one_sacct(world: World) -> None:
    for number in range(1, 501):
        job_id = str(number)
        world.job(world.run(f"first-{number}"), job_id=job_id)
        if number % 2:
            world.shows("RUNNING", job_id=job_id, comment=f"hpc:first-{number}/first")
        else:
            world.accounts("TIMEOUT", job_id=job_id)
    found = world.all()
    assert world.asked == ["squeue", "sacct"]
    assert [s.state for s in found] == ["TIMEOUT", "RUNNING"] * 250, "the newest run first"


def test_sacct_is_not_asked_where_squeue_knows_all(world: World) -> None:
    world.job(world.run())
    world.shows("RUNNING")
    world.all()
    assert world.asked == ["squeue"]


# ---- on this machine


def local(world: World, **process: Any) -> StageDir:
    """A stage that this very process runs, as far as the files tell."""
    mine = {"pid": os.getpid(), "start": process_start(os.getpid()), "group": 1, **process}
    folder = world.job(world.run(), scheduler="local", job_id=str(mine["pid"]))
    rundir.write_json(folder.attempt(1).process, mine)
    return folder


def test_local_stage_that_waits_for_its_input_is_pending(world: World) -> None:
    folder = local(world)
    rundir.write_json(folder.job, {**(rundir.read_json(folder.job) or {}), "after": ["prepare"]})
    assert (world.one().state, world.one().reason) == ("PENDING", "waits for the stage before it")


def test_local_stage_at_work_is_running(world: World) -> None:
    attempt = local(world).attempt(1)
    attempt.launch.write_text("{}")
    rundir.append_event(attempt.events, "running", done=1, total=2)
    found = world.one()
    assert (found.state, found.node, found.done) == ("RUNNING", os.uname().nodename, 1)
    assert found.elapsed_s is not None


@pytest.mark.parametrize("phase", ["staging", "checking"])
def test_local_stage_whose_image_is_made_ready_is_running(world: World, phase: str) -> None:
    rundir.append_event(local(world).attempt(1).events, phase, done=1, total=2, message="m")
    assert (world.one().state, world.one().phase) == ("RUNNING", phase)


def test_local_stage_ends_as_its_outcome_says(world: World) -> None:
    ended(local(world, start="gone").attempt(1), "TIMEOUT")
    assert world.one().state == "TIMEOUT"


def test_local_stage_whose_process_is_gone_is_lost(world: World) -> None:
    local(world, start="another process has this number now")
    assert world.one().state == LOST


def test_local_stage_that_was_killed_by_hpc_cancel_is_cancelled(world: World) -> None:
    rundir.write_json(local(world, start="gone").attempt(1).stop, {})
    assert world.one().state == "CANCELLED"


def of_another_machine(world: World, silent_s: float = 0) -> StageDir:
    """A stage that runs on login2, where its last sign of life is so old."""
    folder = local(world, start="of login2", host="login2", heartbeat_s=30)
    attempt = folder.attempt(1)
    attempt.launch.write_text("{}")
    attempt.heartbeat.touch()
    for path in (attempt.process, attempt.heartbeat):
        os.utime(path, (time.time() - silent_s,) * 2)
    return folder


@pytest.mark.parametrize(("silent_s", "state"), [(0, "RUNNING"), (140, "RUNNING"), (160, LOST)])
def test_local_stage_of_another_machine_lives_as_long_as_its_heart_beats(
    world: World, silent_s: float, state: str
) -> None:
    of_another_machine(world, silent_s)
    assert (world.one().state, world.one().node) == (state, "login2")
    assert world.one().reason == ("no sign of life from login2" if state == LOST else "")


def test_local_stage_of_another_machine_ends_as_its_outcome_says(world: World) -> None:
    ended(of_another_machine(world).attempt(1), "TIMEOUT")
    assert world.one().state == "TIMEOUT"


def test_local_stage_of_another_machine_is_not_cancelled_from_here(world: World) -> None:
    attempt = of_another_machine(world).attempt(1)
    with pytest.raises(RuntimeUnavailable, match="pipeline-1/first runs on login2") as caught:
        cancel(RunDir(world.runs.path / "pipeline-1"), world.all())
    assert caught.value.hint == "ssh login2, then hpc cancel pipeline-1/first"
    assert not attempt.stop.exists()


def test_local_stage_never_asks_slurm(world: World) -> None:
    local(world)
    world.all()
    assert world.asked == []


@pytest.mark.parametrize("state", ["TIMEOUT", "OUT_OF_MEMORY", "PREEMPTED", "NODE_FAIL"])
def test_slurms_word_brings_its_own_reason(world: World, state: str) -> None:
    ended(world.job(world.run()).attempt(1), "CANCELLED", cause="it was cancelled, or preempted")
    world.shows(state)
    assert (world.one().reason, world.one().resumable) == next((r, again) for s, r, again in ENDS if s == state)


def test_completed_without_its_manifest_says_why_it_does_not_count(world: World) -> None:
    ended(world.job(world.run()).attempt(1), "COMPLETED", cause="")
    assert world.one().reason == "its manifest.json is gone"


def test_user_is_whom_slurm_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert Scheduler().user == pwd.getpwuid(os.getuid()).pw_name


def test_a_service_says_how_much_it_does(world: World) -> None:
    folder = world.job(world.run())
    world.shows("RUNNING")
    rundir.append_event(folder.attempt(1).events, "ready")
    where = Endpoint(
        host="dgx01", bound="0.0.0.0", ports={"http": 9250}, path="/", health="/health", job_id="7", pid=1, ready=NOW
    )
    endpoint.write(folder, where, "secret")
    assert view.progress(world.one()) == "ready on dgx01:9250"
    figures = {"schema": "hpc.figures/1", "t": NOW + 5, "running": 3, "tokens_s": 41.4, "done": 9, "failed": 0}
    rundir.write_json(folder.figures, figures)
    found = world.one()
    assert view.progress(found) == "ready on dgx01:9250  3 running · 41 tok/s · 9 done"
    assert found.figures == {name: value for name, value in figures.items() if name != "schema"}
    rundir.write_json(folder.figures, {**figures, "t": NOW - 5})  # an earlier start's
    assert (world.one().figures, view.progress(world.one())) == (None, "ready on dgx01:9250")
