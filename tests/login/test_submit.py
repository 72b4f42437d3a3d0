"""A plan becomes jobs; whatever happens in between, the same submit again completes it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.core import rundir
from hpc.core.errors import HpcError, Interrupted, Refused, RuntimeUnavailable, UsageError
from hpc.core.plan import Plan, plan
from hpc.core.rundir import RunDir
from hpc.core.site import Site
from hpc.login import batch, planning, slurm, snapshot
from hpc.login.place import Placed
from hpc.login.planning import Work
from hpc.login.settings import Project, Settings
from hpc.login.states import Scheduler, states
from hpc.login.submit import Submission, prepare, submit
from tests.core.fakes import FakeFacts, chain, wish

SUBMIT_SLURM = batch.submit_slurm
NAMES = ["prepare", "finetune", "merge"]


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing more is run, no file is written."""


class Cluster:
    """A Slurm that keeps jobs in a dict, in place of sbatch, squeue, sacct and scancel."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.jobs: dict[str, dict[str, str]] = {}
        self.submitted: list[tuple[str, str | None]] = []
        self.before: dict[str, BaseException] = {}
        """Stage -> what happens in place of its sbatch."""
        self.after: dict[str, BaseException] = {}
        """Stage -> what happens once its sbatch is through."""
        monkeypatch.setattr(batch, "preload", lambda: None)
        monkeypatch.setattr(batch, "submit_slurm", self._sbatch)
        monkeypatch.setattr(slurm, "cancel", self._scancel)

    def _sbatch(self, placed: Placed, dependency: str | None, user: str) -> str:
        if placed.name in self.before:
            raise self.before.pop(placed.name)
        job_id = str(101 + len(self.jobs))
        self.jobs[job_id] = {"state": "PENDING", "comment": placed.comment}
        self.submitted.append((placed.name, dependency))
        if placed.name in self.after:
            raise self.after.pop(placed.name)
        return job_id

    def _scancel(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            self.jobs[job_id]["state"] = "CANCELLED"

    def _call(self, argv: Sequence[str]) -> str:
        if argv[0] == "squeue":
            return "\n".join(f"{i}|{j['state']}|None|N/A|5|1:00||{j['comment']}" for i, j in self.jobs.items())
        return ""

    # ---- what a user does

    def scheduler(self) -> Scheduler:
        return Scheduler(user="alice", call=self._call)

    def plan(self, wanted: str = "merge", **prepare: Any) -> Plan:
        first, *rest = chain()
        return plan([wish(first, **prepare), *map(wish, rest)], [wanted], self.site(), FakeFacts())

    def site(self) -> Site:
        return Site(name="dgx", scheduler="slurm", partition="batch", apptainer="apptainer")

    def settings(self) -> Settings:
        project = Project(root=self.folder, file=None, tables={}, runs=self.folder / "runs")
        return Settings(project=project, site=self.site(), wishes=(), origins={})

    def prepare(self, target: str = "pipeline", wanted: str = "merge", **config: Any) -> Submission:
        return prepare(self.plan(wanted, **config), self.settings(), target, self.scheduler())

    def submit(self, target: str = "pipeline", wanted: str = "merge", **config: Any) -> Submission:
        """The whole of `hpc submit TARGET`."""
        work = self.prepare(target, wanted, **config)
        submit(work, self.settings(), self.scheduler(), lambda text: None)
        return work

    def states(self, run: RunDir) -> dict[str, str]:
        asked = rundir.read_json(run.run)
        assert asked is not None
        return {s.stage: s.state for s in states([(run, asked)], self.scheduler())}

    def finish(self, run: RunDir, *names: str) -> None:
        """These stages have run to their end."""
        for name in names:
            stage = run.stage(name)
            job = rundir.read_json(stage.job)
            assert job is not None
            self.jobs[job["job_id"]]["state"] = "COMPLETED"
            rundir.write_json(stage.manifest, {"key": job["key"]})
            outcome = {"state": "COMPLETED", "started": 1, "ended": 2}
            rundir.write_json(stage.attempt(job["attempt"]).outcome, outcome)

    def fail(self, run: RunDir, name: str) -> None:
        job = rundir.read_json(run.stage(name).job)
        assert job is not None
        self.jobs[job["job_id"]]["state"] = "FAILED"
        outcome = {"state": "FAILED", "started": 1, "ended": 2, "exit_code": 1}
        rundir.write_json(run.stage(name).attempt(job["attempt"]).outcome, outcome)

    @property
    def runs(self) -> list[str]:
        folder = self.folder / "runs"
        return sorted({p.name for p in folder.iterdir()} - {".cache"}) if folder.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def job(run: RunDir, name: str) -> dict[str, Any]:
    return rundir.read_json(run.stage(name).job) or {}


# ---- a new run


def test_stages_are_submitted_in_order_each_after_its_input(cluster: Cluster) -> None:
    cluster.submit()
    assert cluster.submitted == [("prepare", None), ("finetune", "afterok:101"), ("merge", "afterok:102")]


def test_run_folder_tells_what_was_asked(cluster: Cluster) -> None:
    work = cluster.submit()
    asked = rundir.read_json(work.run.run)
    assert asked is not None
    assert (asked["schema"], asked["run"], asked["site"], asked["uid"]) == (
        "hpc.run/1",
        "pipeline-1",
        "dgx",
        os.getuid(),
    )
    assert asked["keys"] == work.plan.keys
    assert asked["git"] is None, "the project is not in git"


def test_run_carries_the_code_that_its_jobs_import(cluster: Cluster) -> None:
    code = cluster.submit().run.code
    assert (code / "hpc" / "inside" / "runner.py").is_file()
    assert (code / "stages" / "prepare.py").is_file()
    assert (code / "templates" / "sites" / "local.toml").is_file()
    assert not (code / "hpc" / "login").exists(), "the login node's part stays there"


def test_every_stage_has_its_config_and_its_job(cluster: Cluster) -> None:
    run = cluster.submit().run
    for name, job_id in zip(NAMES, ("101", "102", "103"), strict=True):
        assert (rundir.read_json(run.stage(name).config) or {})["stage"] == name
        assert (job(run, name)["status"], job(run, name)["job_id"], job(run, name)["attempt"]) == (
            "submitted",
            job_id,
            1,
        )
        assert job(run, name)["comment"] == cluster.jobs[job_id]["comment"]


def test_comment_is_unique_over_runs_folders(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.submit()
    other = Cluster(tmp_path / "elsewhere", monkeypatch)
    other.submit()
    ours, theirs = ({j["comment"] for j in c.jobs.values()} for c in (cluster, other))
    assert len(ours | theirs) == 6


def test_nothing_is_written_by_planning(cluster: Cluster) -> None:
    cluster.prepare()
    assert cluster.runs == []


# ---- the same again


def test_second_submit_finds_nothing_to_do(cluster: Cluster) -> None:
    first = cluster.submit()
    again = cluster.prepare()
    assert (again.run, again.is_new, again.todo) == (first.run, False, ())


def test_second_submit_of_a_finished_run_finds_nothing_to_do(cluster: Cluster) -> None:
    cluster.finish(cluster.submit().run, *NAMES)
    assert cluster.prepare().todo == ()
    assert cluster.prepare().saved() == (0, 0), "these manifests have no times"


def test_part_of_a_run_that_is_there_is_no_new_run(cluster: Cluster) -> None:
    run = cluster.submit().run
    assert cluster.prepare("finetune", "finetune").run == run


def test_failed_stage_and_those_after_it_are_submitted_again(cluster: Cluster) -> None:
    run = cluster.submit().run
    cluster.finish(run, "prepare")
    cluster.fail(run, "finetune")
    cluster.jobs["103"]["state"] = "CANCELLED"
    again = cluster.submit()
    assert again.run == run
    assert cluster.submitted[3:] == [("finetune", None), ("merge", "afterok:104")]
    assert (job(run, "finetune")["attempt"], job(run, "prepare")["attempt"]) == (2, 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"nodes": 2}, ""),
        ({"gpus_per_node": 2}, ""),
        ({}, "finetune was stopped with 2 ranks, and cannot go on with 1"),
        ({"nodes": 2, "gpus_per_node": 4}, "cannot go on with 8"),
    ],
)
def test_another_number_of_ranks_is_refused_before_it_waits(cluster: Cluster, asked: dict[str, int], said: str) -> None:
    first, trained, last = chain()
    stages = [first, replace(trained, launcher="torchrun"), last]

    def again(**resources: int) -> Submission:
        wishes = [wish(one, resources=resources if one.name == "finetune" else {}) for one in stages]
        made = plan(wishes, ["finetune"], replace(cluster.site(), gpus="gres"), FakeFacts())
        return prepare(made, cluster.settings(), "finetune", cluster.scheduler())

    work = again(nodes=2)
    submit(work, cluster.settings(), cluster.scheduler(), lambda text: None)
    cluster.finish(work.run, "prepare")
    cluster.fail(work.run, "finetune")
    folder = work.run.stage("finetune")
    folder.checkpoints.mkdir()
    rundir.write_json(folder.ranks, {"ranks": 2})
    planning.refuse_other_ranks(again(**asked))  # it was stopped before it saved any
    (folder.checkpoints / "checkpoint-5").mkdir()
    if not said:
        planning.refuse_other_ranks(again(**asked))
        return
    with pytest.raises(Refused, match=said) as refused:
        planning.refuse_other_ranks(again(**asked))
    assert "nodes × gpus_per_node = 2 again" in str(refused.value.hint)


def test_other_settings_make_a_new_run_with_the_next_number(cluster: Cluster) -> None:
    cluster.submit()
    assert cluster.submit(rank=9).run.id == "pipeline-2"
    assert cluster.submit("finetune", "finetune", rank=10).run.id == "finetune-3"


def test_other_code_makes_a_new_run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.submit()
    monkeypatch.setattr(snapshot, "digest", lambda: "changed")
    assert cluster.submit().run.id == "pipeline-2"


def test_run_of_another_user_is_not_continued(cluster: Cluster) -> None:
    run = cluster.submit().run
    rundir.write_json(run.run, {**(rundir.read_json(run.run) or {}), "uid": os.getuid() + 1})
    assert cluster.prepare().is_new


# ---- results of other runs


def finished_by_other_code(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, *names: str) -> RunDir:
    """A run whose results count, but that can't be continued."""
    run = cluster.submit().run
    cluster.finish(run, *names)
    monkeypatch.setattr(snapshot, "digest", lambda: "changed")
    cluster.submitted.clear()
    return run


def test_result_of_another_run_is_taken_over(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    old = finished_by_other_code(cluster, monkeypatch, "prepare")
    work = cluster.submit()
    assert cluster.submitted == [("finetune", None), ("merge", "afterok:104")]
    assert job(work.run, "prepare")["reused"] == old.id
    assert cluster.states(work.run)["prepare"] == "COMPLETED"
    config = rundir.read_json(work.run.stage("finetune").config)
    assert config is not None
    assert config["inputs"]["dataset"]["path"] == str(old.stage("prepare").out / "result")


def test_result_that_was_taken_over_counts_when_the_run_goes_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = finished_by_other_code(cluster, monkeypatch, "prepare")
    run = cluster.submit().run
    cluster.fail(run, "finetune")
    cluster.jobs["105"]["state"] = "CANCELLED"
    cluster.submitted.clear()
    again = cluster.submit()
    assert again.run == run
    assert cluster.submitted == [("finetune", None), ("merge", "afterok:106")]
    assert again.placed[1].document["inputs"]["dataset"]["path"].startswith(str(old.path))


def test_manifest_of_another_key_is_not_taken_over(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    old = finished_by_other_code(cluster, monkeypatch, "prepare")
    rundir.write_json(old.stage("prepare").manifest, {"key": "other"})
    assert cluster.prepare().reused == {}


# ---- accidents


@pytest.mark.parametrize("name", NAMES)
def test_kill_before_sbatch_leaves_a_run_that_submit_completes(cluster: Cluster, name: str) -> None:
    cluster.before[name] = Killed()
    with pytest.raises(Killed):
        cluster.submit()
    (run,) = cluster.runs
    there = NAMES[: NAMES.index(name)]
    wanted = {n: "PENDING" if n in there else "NOT_SUBMITTED" for n in NAMES}
    assert cluster.states(RunDir(cluster.folder / "runs" / run)) == wanted
    cluster.submit()
    assert [n for n, _ in cluster.submitted] == NAMES, "each exactly once"
    assert cluster.runs == [run]


@pytest.mark.parametrize("name", NAMES)
def test_kill_after_sbatch_does_not_submit_twice(cluster: Cluster, name: str) -> None:
    cluster.after[name] = Killed()
    with pytest.raises(Killed):
        cluster.submit()
    (run,) = cluster.runs
    folder = RunDir(cluster.folder / "runs" / run)
    assert job(folder, name)["job_id"] is None
    assert cluster.states(folder)[name] == "PENDING", "found by its comment"
    cluster.submit()
    assert [n for n, _ in cluster.submitted] == NAMES
    assert job(folder, name)["status"] == "submitted"
    assert [d for _, d in cluster.submitted] == [None, "afterok:101", "afterok:102"]


def test_rejection_withdraws_what_was_queued_before_it(cluster: Cluster) -> None:
    cluster.before["finetune"] = RuntimeUnavailable("no such partition")
    with pytest.raises(RuntimeUnavailable, match="no such partition"):
        cluster.submit()
    assert [j["state"] for j in cluster.jobs.values()] == ["CANCELLED"]
    run = RunDir(cluster.folder / "runs" / "pipeline-1")
    assert cluster.states(run) == {"prepare": "CANCELLED", "finetune": "NOT_SUBMITTED", "merge": "NOT_SUBMITTED"}


def test_rejected_pipeline_can_be_submitted_again(cluster: Cluster) -> None:
    cluster.before["finetune"] = RuntimeUnavailable("no such partition")
    with pytest.raises(RuntimeUnavailable):
        cluster.submit()
    cluster.submitted.clear()
    work = cluster.submit()
    assert [n for n, _ in cluster.submitted] == NAMES
    assert work.run.id == "pipeline-1"
    assert job(work.run, "prepare")["attempt"] == 2


def test_rejection_of_the_first_stage_leaves_no_run(cluster: Cluster) -> None:
    cluster.before["prepare"] = RuntimeUnavailable("no such account")
    with pytest.raises(RuntimeUnavailable):
        cluster.submit()
    assert cluster.runs == []


def test_answer_of_sbatch_that_was_lost_leaves_the_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch and squeue are stubs; Slurm has taken the job, and neither hears of it."""
    for name in ("sbatch", "squeue"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho 'sbatch: error: Unable to contact slurm controller' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    with monkeypatch.context() as patch:
        patch.setattr(batch, "submit_slurm", SUBMIT_SLURM)
        with pytest.raises(RuntimeUnavailable, match="cannot be reached"):
            cluster.submit()
    assert cluster.runs == ["pipeline-1"]
    lost = RunDir(cluster.folder / "runs" / "pipeline-1").stage("prepare")
    assert (lost.attempt(1).scheduler / batch.PICKLE).is_file()
    cluster.jobs["101"] = {"state": "PENDING", "comment": (rundir.read_json(lost.job) or {})["comment"]}
    work = cluster.submit()
    assert work.run.id == "pipeline-1"
    assert cluster.submitted == [("finetune", "afterok:101"), ("merge", "afterok:102")]


def test_rejection_withdraws_only_what_this_call_queued(cluster: Cluster) -> None:
    run = cluster.submit("prepare", "prepare").run
    asked = rundir.read_json(run.run) or {}
    rundir.write_json(run.run, {**asked, "keys": cluster.plan().keys})  # the run as one that was killed after prepare
    cluster.before["merge"] = RuntimeUnavailable("no")
    with pytest.raises(RuntimeUnavailable):
        cluster.submit()
    assert [j["state"] for j in cluster.jobs.values()] == ["PENDING", "CANCELLED"]


def test_ctrl_c_between_two_stages_says_what_was_submitted(cluster: Cluster) -> None:
    cluster.before["finetune"] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(Interrupted, match="prepare of pipeline-1 was submitted") as caught:
        cluster.submit()
    assert "again" in caught.value.hint
    assert [j["state"] for j in cluster.jobs.values()] == ["PENDING"], "it goes on"
    cluster.submit()
    assert [n for n, _ in cluster.submitted] == NAMES


def test_slurm_that_cannot_be_asked_stops_before_anything_is_written(cluster: Cluster) -> None:
    cluster.submit()

    def down(argv: Sequence[str]) -> str:
        raise RuntimeUnavailable("down")

    with pytest.raises(RuntimeUnavailable, match="down"):
        prepare(cluster.plan(), cluster.settings(), "pipeline", Scheduler(user="alice", call=down))


def test_runs_folder_that_cannot_be_made_is_a_usage_error(cluster: Cluster) -> None:
    project = replace(cluster.settings().project, runs=Path("/proc/none/runs"))  # root may write everywhere else
    settings = replace(cluster.settings(), project=project)
    work = prepare(cluster.plan(), settings, "pipeline", cluster.scheduler())
    with pytest.raises(UsageError, match="the run folder /proc/none/runs/pipeline-1 cannot be written: ") as caught:
        submit(work, settings, cluster.scheduler(), lambda text: None)
    assert "HPC_RUNS" in caught.value.hint
    assert cluster.submitted == []


def test_no_space_for_the_snapshot_leaves_no_half_run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(target: Path) -> None:
        target.mkdir()
        (target / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "copy", full)
    with pytest.raises(OSError, match="No space left on device"):
        cluster.submit()
    assert cluster.runs == []


def test_name_that_is_not_utf_8_leaves_no_half_run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    project = replace(cluster.settings().project, runs=cluster.folder / "caf\udce9")
    with pytest.raises(UnicodeEncodeError):
        prepare(cluster.plan(), replace(cluster.settings(), project=project), "pipeline", cluster.scheduler())
    with monkeypatch.context() as argv:
        argv.setattr("sys.argv", ["hpc", "caf\udce9"])
        with pytest.raises(UnicodeEncodeError):
            cluster.submit()
    assert cluster.runs == []
    cluster.before["prepare"] = UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed")
    with pytest.raises(UnicodeEncodeError):
        cluster.submit()
    assert cluster.runs == []


def test_patch_of_the_project_is_for_its_owner_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "git_state", lambda root: ({}, "a patch"))
    assert stat.S_IMODE(cluster.submit().run.patch.stat().st_mode) == 0o600


def test_secret_on_the_command_line_is_not_written_down(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["hpc", "submit", "merge", "--set", "site.env.HF_TOKEN=hf_x"])
    asked = rundir.read_json(cluster.submit().run.run) or {}
    assert asked["command"] == ["hpc", "submit", "merge", "--set", "site.env.HF_TOKEN=(not shown)"]


# ---- two at once


def test_two_that_continue_one_run_do_not_submit_a_stage_twice(cluster: Cluster) -> None:
    run = cluster.submit().run
    cluster.fail(run, "prepare")
    for job_id in ("102", "103"):
        cluster.jobs[job_id]["state"] = "CANCELLED"
    one, two = cluster.prepare(), cluster.prepare()
    cluster.submitted.clear()
    submit(one, cluster.settings(), cluster.scheduler(), lambda text: None)
    with pytest.raises(RuntimeUnavailable, match="is being submitted by another hpc"):
        submit(two, cluster.settings(), cluster.scheduler(), lambda text: None)
    assert [n for n, _ in cluster.submitted] == NAMES
    assert cluster.states(run) == dict.fromkeys(NAMES, "PENDING"), "the first one's jobs are untouched"


def test_stage_whose_record_could_not_be_written_can_be_submitted_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cluster.submit().run
    cluster.fail(run, "prepare")
    for job_id in ("102", "103"):
        cluster.jobs[job_id]["state"] = "CANCELLED"
    cluster.submitted.clear()
    write = rundir.write_json

    def full(path: Path, *given: Any, **options: Any) -> None:
        if path == run.stage("prepare").job:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *given, **options)

    with monkeypatch.context() as disk:
        disk.setattr(rundir, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            cluster.submit()
    assert cluster.submitted == []
    assert cluster.submit().run == run
    assert [n for n, _ in cluster.submitted] == NAMES


def test_two_that_start_the_same_run_make_one(cluster: Cluster) -> None:
    one, two = cluster.prepare(), cluster.prepare()
    submit(one, cluster.settings(), cluster.scheduler(), lambda text: None)
    with pytest.raises(HpcError):
        submit(two, cluster.settings(), cluster.scheduler(), lambda text: None)
    assert [n for n, _ in cluster.submitted] == NAMES
    assert cluster.runs == ["pipeline-1"]
    assert cluster.prepare().todo == ()


def test_two_that_start_different_runs_get_one_each(cluster: Cluster) -> None:
    one, two = cluster.prepare(rank=1), cluster.prepare(rank=2)
    made = [
        planning.submit(Work(settings=cluster.settings(), submission=work), cluster.scheduler(), lambda text: None)
        for work in (one, two)
    ]
    assert [work.submission.run.id for work in made] == cluster.runs == ["pipeline-1", "pipeline-2"]
    assert [n for n, _ in cluster.submitted] == [*NAMES, *NAMES]
    assert made[1].submission.placed[0].stage_dir.path.parent.name == "pipeline-2"


# ---- dry run


def test_missing_ids_are_placeholders_in_the_dependency(cluster: Cluster) -> None:
    work = cluster.prepare()
    assert [work.dependency(p, {}) for p in work.placed] == [None, "afterok:@prepare", "afterok:@finetune"]


def test_comment_of_a_stage_is_the_same_each_time_it_is_computed(cluster: Cluster) -> None:
    """It is what finds the job again."""
    one, two = cluster.prepare(), cluster.prepare()
    assert [p.comment for p in one.placed] == [p.comment for p in two.placed]


def test_result_that_was_taken_over_and_is_gone_is_made_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = finished_by_other_code(cluster, monkeypatch, "prepare")
    cluster.submit()
    for one in cluster.jobs.values():
        one["state"] = "CANCELLED"
    shutil.rmtree(old.path)
    cluster.submitted.clear()
    cluster.submit()
    assert [n for n, _ in cluster.submitted] == NAMES
