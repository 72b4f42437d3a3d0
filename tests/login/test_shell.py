"""Which stage a shell enters, how srun is called for it, and what is shown of srun's own words."""

from __future__ import annotations

import io
import os
import stat
import sys
from pathlib import Path

import pytest

from hpc.core import rundir
from hpc.core.errors import HpcError, NotFound, RuntimeUnavailable, UsageError
from hpc.core.rundir import RunDir
from hpc.login import shell
from hpc.login.states import Scheduler
from tests.login.test_states import World
from tests.login.test_view import state

RUN = RunDir(Path("/runs/pipeline-1"))


def test_without_a_stage_it_is_the_one_at_work() -> None:
    rows = [state(state="COMPLETED"), state(stage="second"), state(stage="third", state="PENDING")]
    assert shell.choose(RUN, None, rows).stage == "second"


def test_two_at_work_must_be_told_apart() -> None:
    rows = [state(), state(stage="second")]
    with pytest.raises(UsageError, match="several stages at work: first, second") as caught:
        shell.choose(RUN, None, rows)
    assert caught.value.hint == "name one: hpc shell pipeline-1/first"
    assert shell.choose(RUN, "second", rows).stage == "second"


@pytest.mark.parametrize(
    ("stage", "said"), [(None, "no stage of pipeline-1 is running"), ("first", "pipeline-1/first is PENDING")]
)
def test_what_does_not_run_has_no_container(stage: str | None, said: str) -> None:
    with pytest.raises(NotFound, match=said):
        shell.choose(RUN, stage, [state(state="PENDING")])


class Srun:
    """A job that runs, and a program named srun that does what the test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.world = World(folder / "runs")
        self.run = self.world.run()
        self.stage = self.world.job(self.run, python="/nodes/python3")
        self.queue("RUNNING")
        rundir.write_json(self.stage.attempt(1).launch, {"argv": [], "env": {}})
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setattr(shell, "Scheduler", lambda: Scheduler(user="alice", call=self.world))

    def queue(self, word: str) -> None:
        self.world.queue = [f"7|{word}|None|1|1|1:00:00|dgx01|hpc:pipeline-1/first"]

    def does(self, script: str) -> None:
        path = self.folder / "srun"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def enter(self, *program: str, node: str | None = None) -> int:
        row = state(job_id="7", attempt=1, node="dgx01", folder=str(self.stage.path))
        return shell.enter(self.run, row, program or ("true",), node)


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Srun:
    return Srun(tmp_path, monkeypatch)


def test_step_runs_beside_the_others_with_the_jobs_own_code(srun: Srun, capfd: pytest.CaptureFixture[str]) -> None:
    srun.does('echo "$@"; echo "$PYTHONPATH"')
    assert srun.enter("ls", "-l", node="dgx02") == 0
    argv, path = capfd.readouterr().out.splitlines()
    assert argv == (
        "--overlap --jobid=7 --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=dgx02 --quit-on-interrupt"
        f" /nodes/python3 -m hpc.node.shell {srun.stage.path} 1 ls -l"
    )
    assert path == str(srun.run.code)


def test_variables_of_another_job_and_its_gpus_stay_behind(
    srun: Srun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("SLURM_JOB_ID", "SRUN_DEBUG", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "other")
    srun.does('echo "$SLURM_JOB_ID$SRUN_DEBUG$CUDA_VISIBLE_DEVICES"')
    srun.enter()
    assert capfd.readouterr().out == "\n"


def test_exit_code_is_the_programs_and_slurms_remark_on_it_is_not_shown(
    srun: Srun, capfd: pytest.CaptureFixture[str]
) -> None:
    srun.does("echo mine >&2; echo 'srun: error: dgx01: task 0: Exited with exit code 5' >&2; exit 5")
    assert srun.enter() == 5
    assert capfd.readouterr().err == "mine\n"


def test_program_that_died_by_itself_gives_its_code(srun: Srun) -> None:
    srun.does("echo 'srun: error: dgx01: task 0: Killed' >&2; exit 137")
    assert srun.enter() == 137


@pytest.mark.parametrize(
    ("words", "code", "kind", "said"),
    [
        ("srun: error: Slurm job 7 has expired", 1, HpcError, "its job has ended"),
        ("srun: error: Unable to confirm allocation for job 7: Invalid job id specified", 1, HpcError, "has ended"),
        (
            "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\n"
            "slurmstepd-dgx01: error: *** STEP 7.1 ON dgx01 CANCELLED AT 2026-11-25T02:58:58 ***\n"
            "srun: error: dgx01: task 0: Terminated",
            143,
            HpcError,
            "its job has ended",
        ),
        ("srun: unrecognized option '--overlap'", 255, RuntimeUnavailable, "older than 20.11"),
        (
            "srun: error: Unable to create step for job 7: Requested node configuration is not available",
            1,
            UsageError,
            "its job is not on this node",
        ),
        (
            "srun: error: Unable to create step for job 7: Access/permission denied",
            1,
            RuntimeUnavailable,
            "does not let you",
        ),
        (
            "slurmstepd: error: execve(): /nodes/python3: No such file or directory\n"
            "srun: error: dgx01: task 0: Exited with exit code 2",
            2,
            RuntimeUnavailable,
            "/nodes/python3: No such file",
        ),
        ("srun: error: Unable to contact slurm controller (connect failure)", 1, RuntimeUnavailable, "be reached"),
    ],
)
def test_step_that_could_not_run_is_explained(
    srun: Srun, words: str, code: int, kind: type[HpcError], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (srun.folder / "words").write_text(words + "\n")
    srun.does(f"cat {srun.folder}/words >&2; exit {code}")
    with pytest.raises(kind) as caught:
        srun.enter()
    assert type(caught.value) is kind
    assert said in caught.value.message
    assert capfd.readouterr().err == ""


def test_shell_that_was_ended_with_its_job_is_told_so(srun: Srun) -> None:
    srun.does("echo 'srun: error: dgx01: task 0: Killed' >&2; exit 137")
    srun.queue("CANCELLED")
    with pytest.raises(HpcError, match="pipeline-1/first: its job has ended"):
        srun.enter()


def test_container_that_is_not_there_yet(srun: Srun) -> None:
    srun.stage.attempt(1).launch.unlink()
    with pytest.raises(HpcError, match="has not started its container yet") as caught:
        srun.enter()
    assert caught.value.exit_code == 1


def test_no_srun_is_4(srun: Srun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeUnavailable, match="srun is not on this machine"):
        srun.enter()


@pytest.mark.parametrize(
    ("pieces", "shown", "kept"),
    [
        ([b"plain\n"], b"plain\n", []),
        ([b"no end"], b"no end", []),
        ([b"a prompt: ", b"srun: mine\n"], b"a prompt: srun: mine\n", []),
        ([b"sr", b"un: error: x\nrest\n"], b"rest\n", ["srun: error: x"]),
        ([b"slurmstepd-dgx01: error: y\n", b"s"], b"s", ["slurmstepd-dgx01: error: y"]),
        ([b"srunning\r10%\r", b"20%\n"], b"srunning\r10%\r20%\n", []),
        ([b"\xff\xfe\n"], b"\xff\xfe\n", []),
    ],
)
def test_stderr_passes_as_it_comes_but_for_slurms_lines(
    pieces: list[bytes], shown: bytes, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = io.BytesIO(), list[str]()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(out))
    waiting = [*pieces, b""]
    monkeypatch.setattr(os, "read", lambda number, size: waiting.pop(0))
    with open(os.devnull, "rb") as source:
        shell._relay(source, words)
    assert (out.getvalue(), words) == (shown, kept)
