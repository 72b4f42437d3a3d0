"""The real command line on this machine: real processes, probe stages, site local."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hpc.node.enter import process_start
from tests.support import probe

ROOT = Path(__file__).resolve().parent.parent.parent
CHAIN = ["first", "second", "third"]


def until(found: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    """Ask until there is something."""
    deadline = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hpc as a user has it, with three probe stages added."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("hpc", "stages", "templates"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert probe.write_chain(folder / "stages") == CHAIN
    return folder


def of_group(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended meanwhile
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(pid))
    return found


class Local:
    """A project of a user, and `hpc` run in it."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder = folder
        self.packages = packages
        self.started: list[subprocess.Popen[str]] = []
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "python3").symlink_to(sys.executable)
        (folder / "hpc.toml").write_text(
            'site = "local"\n[environments]\ntrain = "venv"\n[pipeline]\nstages = ["first", "second", "third"]\n'
        )

    def env(self, **more: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HPC_", "SLURM_", "SBATCH_", "PYTHON"))}
        return {**clean, "PYTHONPATH": str(self.packages), "XDG_CONFIG_HOME": str(self.folder / "config"), **more}

    def hpc(self, *arguments: str, code: int = 0, before: str = "", env: dict[str, str] | None = None) -> Any:
        """`hpc ARGUMENTS`, which must end with this code. `before`: Python that runs in the process first."""
        done = self.popen(*arguments, before=before, env=env)
        out, err = done.communicate(timeout=120)
        assert done.returncode == code, (done.returncode, out, err)
        return subprocess.CompletedProcess(arguments, code, out, err)

    def popen(self, *arguments: str, before: str = "", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        start = ["-c", f"{before}\nimport sys\nfrom hpc.login.cli import main\nsys.exit(main())"]
        argv = [sys.executable, "-W", "error", *(start if before else ["-m", "hpc"]), *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            argv, cwd=self.folder, env=self.env(**(env or {})), stdout=pipe, stderr=pipe, text=True
        )
        self.started.append(process)
        return process

    def json(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.hpc(*arguments, "--json").stdout)
        return found

    def states(self, run: str = "") -> dict[str, str]:
        return {s["stage"]: s["state"] for s in self.json("status", *run.split())["stages"]}

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "runs" / name).read_text())
        return found

    def running(self, stage: str = "pipeline-1/first") -> int:
        """The stage is at work: its payload's events say so; the process of its controller."""
        events = self.folder / "runs" / stage / "attempt-1" / "events.jsonl"
        until(lambda: events.exists() and '"running"' in events.read_text(), f"{stage} running")
        process: int = self.read(f"{stage}/attempt-1/process.json")["pid"]
        return process

    def enough(self, stage: str = "first-1/first") -> None:
        """The stage need sleep no longer, nor when it is started again."""
        (self.folder / "runs" / stage / "checkpoints" / probe.ENOUGH).touch()

    def end(self) -> None:
        """End what a failed test left: by the process groups that the jobs' files name."""
        for process in self.started:
            process.kill()
            process.communicate()
        for file in self.folder.glob("runs/*/*/attempt-*/process.json"):
            started = json.loads(file.read_text())
            if process_start(started["pid"]) == started["start"]:
                os.killpg(started["group"], signal.SIGKILL)


@pytest.fixture
def local(tmp_path: Path, packages: Path) -> Iterator[Local]:
    made = Local(tmp_path, packages)
    yield made
    made.end()


# ---- a pipeline that completes; looked at from all sides


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[Local]:
    """A project whose pipeline was shown, submitted and waited for."""
    made = Local(tmp_path_factory.mktemp("finished"), packages)
    made.shown = made.json("submit", "pipeline", "--dry-run")  # type: ignore[attr-defined]
    made.submitted = made.hpc("submit", "pipeline", "--wait")  # type: ignore[attr-defined]
    yield made
    made.end()


def test_pipeline_completes_and_says_so(finished: Local) -> None:
    assert "pipeline-1: first, second, third completed" in finished.submitted.stderr  # type: ignore[attr-defined]
    assert finished.states() == dict.fromkeys(CHAIN, "COMPLETED")


def test_stages_ran_in_order_on_each_others_outputs(finished: Local) -> None:
    manifests = [finished.read(f"pipeline-1/{name}/manifest.json") for name in CHAIN]
    assert all(a["ended"] <= b["started"] for a, b in pairwise(manifests))
    inputs = finished.read("pipeline-1/third/out/result.json")["inputs"]
    assert inputs == {"lora_adapter": str(finished.folder / "runs/pipeline-1/second/out/result.json")}


def test_dry_run_wrote_nothing_and_showed_what_was_started(finished: Local) -> None:
    shown = finished.shown  # type: ignore[attr-defined]
    assert (shown["schema"], shown["run"]) == ("hpc.dry-run/1", "pipeline-1")
    assert [s["stage"] for s in shown["stages"]] == CHAIN
    for stage in shown["stages"]:
        started = finished.read(f"pipeline-1/{stage['stage']}/attempt-1/launch.json")
        assert stage["argv"] == started["argv"]
        assert stage["environment"].items() <= started["env"].items()
        assert stage["config"] == finished.read(f"pipeline-1/{stage['stage']}/config.json")


def test_second_submit_says_that_there_is_nothing_to_do(finished: Local) -> None:
    done = finished.hpc("submit", "pipeline")
    assert "pipeline-1: nothing to do for first (done), second (done), third (done)" in done.stdout
    assert [p.name for p in (finished.folder / "runs").iterdir() if p.name != ".cache"] == ["pipeline-1"]


def test_status_json_has_its_schema(finished: Local) -> None:
    found = finished.json("status", "pipeline-1")
    assert (found["schema"], found["runs_folder"]) == ("hpc.status/1", str(finished.folder / "runs"))
    row = found["stages"][0]
    assert set(row) == set(
        "run stage state key scheduler job_id attempt reason hint node elapsed_s limit_min submitted phase done total"
        " message endpoint successor figures exit_code resumable reused folder".split()
    )
    assert (row["run"], row["stage"], row["scheduler"], row["attempt"]) == ("pipeline-1", "first", "local", 1)
    assert row["node"] == os.uname().nodename


def test_status_is_a_table_of_whole_words(finished: Local) -> None:
    lines = finished.hpc("status").stdout.splitlines()
    assert lines[0].split() == "RUN/STAGE JOBID STATE TIME LIMIT NODE PROGRESS / REASON".split()
    assert [line.split()[0] for line in lines[1:]] == [f"pipeline-1/{name}" for name in CHAIN]


def test_plan_says_what_is_done(finished: Local) -> None:
    found = finished.json("plan")
    assert found["schema"] == "hpc.plan/1"
    assert [s["action"] for s in found["stages"]] == ["done"] * 3
    assert "continued" in finished.hpc("plan").stdout


def test_plan_shows_where_each_value_comes_from(finished: Local) -> None:
    found = finished.json("plan", "--set", "first.seconds=1", "--time", "10")
    assert found["origins"]["first.seconds"] == "--set first.seconds=1"
    assert found["origins"]["site.environments"].endswith("hpc.toml")
    assert {s["resources"]["time_min"] for s in found["stages"]} == {10}


def test_changed_setting_runs_only_what_it_changes(finished: Local) -> None:
    found = finished.json("plan", "--set", "third.message=new")
    assert [s["action"] for s in found["stages"]] == ["done in pipeline-1", "done in pipeline-1", "submit"]
    assert found["run"] == "pipeline-2"


def test_logs_are_what_the_stage_printed(finished: Local) -> None:
    done = finished.hpc("logs", "pipeline-1/second")
    assert done.stdout == "hello from second\n"
    assert done.stderr == "==> pipeline-1/second attempt 1: COMPLETED <==\n"
    assert finished.hpc("logs", "first", "-f").stdout == "hello from first\n", "it has ended: nothing to follow"


def test_stage_that_a_run_does_not_have_is_7_and_one_that_is_none_2(finished: Local) -> None:
    assert "has no stage 'merge'" in finished.hpc("logs", "pipeline-1/merge", code=7).stderr
    assert "did you mean 'third'?" in finished.hpc("logs", "pipeline-1/thirt", code=2).stderr


def test_cancel_of_what_has_ended_is_no_error(finished: Local) -> None:
    assert "nothing is running or waiting" in finished.hpc("cancel").stderr
    assert finished.json("cancel") == {"schema": "hpc.cancel/1", "run": "pipeline-1", "cancelled": []}


def test_until_stops_there_and_from_needs_what_is_before(finished: Local) -> None:
    shown = finished.json("plan", "--until", "second", "--set", "first.message=x")
    assert [s["stage"] for s in shown["stages"]] == ["first", "second"]
    refused = finished.hpc("plan", "--from", "second", "--set", "first.message=x", code=3)
    assert "--from second: first is needed and not done with these settings" in refused.stderr


def test_a_reader_that_leaves_does_not_take_the_jobs_along(local: Local) -> None:
    left, pipe = os.pipe()
    os.close(left)
    argv = [sys.executable, "-W", "error", "-m", "hpc", "submit", "pipeline"]
    subprocess.run(argv, cwd=local.folder, env=local.env(), stdout=pipe, stderr=pipe, timeout=60)
    os.close(pipe)
    until(lambda: set(local.states().values()) == {"COMPLETED"}, "completed")


# ---- ends that are not good


def test_failure_is_1_with_cause_log_and_hint(local: Local) -> None:
    done = local.hpc("submit", "pipeline", "--wait", "--set", "first.exit_code=1", code=1)
    assert "pipeline-1/first: FAILED: the probe was told to fail" in done.stderr
    assert "  | error: the probe was told to fail" in done.stderr
    assert "  try: tell it not to" in done.stderr
    assert local.states() == {"first": "FAILED", "second": "CANCELLED", "third": "CANCELLED"}
    assert "the probe was told to fail" in local.hpc("logs").stdout, "without a name: the one that failed"


def test_crash_is_told_as_a_signal(local: Local) -> None:
    done = local.hpc("submit", "first", "--wait", "--set", "first.signal=11", code=1)
    assert "the stage was ended by SIGSEGV" in done.stderr


def test_cancel_ends_running_and_waiting_stages(local: Local) -> None:
    local.hpc("submit", "pipeline", "--set", "first.seconds=600", "--set", "first.checkpoint=true")
    process = local.running()
    assert local.states() == {"first": "RUNNING", "second": "PENDING", "third": "PENDING"}
    done = local.hpc("cancel")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"pipeline-1/{name}" for name in CHAIN]
    assert process_start(process) is None
    assert local.states() == dict.fromkeys(CHAIN, "CANCELLED")
    assert local.hpc("logs").stdout == "hello from first\n", "the others have not begun"


def test_cancel_kills_a_stage_that_does_not_listen(local: Local) -> None:
    local.hpc("submit", "first", "--set", "first.seconds=600")
    process = local.running("first-1/first")
    local.hpc("cancel", "first-1/first", before="from hpc.login import cancel\ncancel._GRACE_S = 0.5")
    assert process_start(process) is None
    (found,) = local.json("status")["stages"]
    assert (found["state"], found["reason"]) == ("CANCELLED", "cancelled by hpc cancel")


def test_stage_that_saves_on_cancel_is_resumed_by_the_next_submit(local: Local) -> None:
    settings = ("--set", "first.seconds=600", "--set", "first.checkpoint=true")
    local.hpc("submit", "first", *settings)
    local.running("first-1/first")
    local.hpc("cancel", "first-1")
    assert (local.folder / "runs/first-1/first/checkpoints/saved").exists()
    local.enough()
    local.hpc("submit", "first", *settings, "--wait")
    assert local.read("first-1/first/out/result.json")["resumed"] is True
    assert local.json("status")["stages"][0]["attempt"] == 2


def test_job_of_an_hpc_that_was_killed_before_it_wrote_the_number_is_known(local: Local) -> None:
    local.hpc("submit", "first", "--set", "first.seconds=600")
    pid = local.running("first-1/first")
    job = local.folder / "runs/first-1/first/job.json"
    before = {**json.loads(job.read_text()), "status": "submitting", "job_id": None}  # as it is just before the start
    job.write_text(json.dumps(before))
    (row,) = local.json("status")["stages"]
    assert (row["state"], row["job_id"]) == ("RUNNING", str(pid))
    assert "nothing to do for first (RUNNING" in local.hpc("submit", "first", "--set", "first.seconds=600").stdout
    assert json.loads(job.read_text())["job_id"] == str(pid)


def test_run_that_has_it_all_is_named_though_the_code_is_newer(local: Local) -> None:
    local.hpc("submit", "first", "--wait")
    local.hpc("submit", "pipeline", "--wait")
    for run in ("first-1", "pipeline-2"):  # as if they were made by another version
        file = local.folder / "runs" / run / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "code": "older"}))
    done = local.hpc("submit", "pipeline", "--wait")
    assert "pipeline-2: nothing to do for first (done), second (done), third (done)" in done.stdout
    assert not (local.folder / "runs" / "pipeline-3").exists()


def test_killed_job_is_lost_and_submit_runs_it_again(local: Local) -> None:
    local.hpc("submit", "first", "--set", "first.seconds=600")
    local.running("first-1/first")
    process = local.read("first-1/first/attempt-1/process.json")
    os.killpg(process["group"], signal.SIGKILL)
    until(lambda: process_start(process["pid"]) is None, "its end")
    assert local.states() == {"first": "LOST"}
    local.enough()
    local.hpc("submit", "first", "--set", "first.seconds=600", "--wait")
    assert local.states() == {"first": "COMPLETED"}


def test_kill_of_a_jobs_id_ends_all_of_it(local: Local) -> None:
    """By the number that `hpc status` shows: what outlived it would write beside what is submitted next."""
    local.hpc("submit", "first", "--set", "first.seconds=60")
    job = local.running("first-1/first")
    group = local.read("first-1/first/attempt-1/process.json")["group"]
    assert len(of_group(group)) > 2, "the controller, the job's entry, the stage"
    os.kill(job, signal.SIGKILL)
    until(lambda: not of_group(group), "the end of all", 5)
    assert local.states() == {"first": "LOST"}


def test_logs_follow_until_the_stage_ends(local: Local) -> None:
    local.hpc("submit", "first", "--set", "first.seconds=600")
    local.running("first-1/first")
    follower = local.popen("logs", "-f", "first-1")
    assert follower.stdout is not None
    assert follower.stdout.readline() == "hello from first\n"
    assert follower.poll() is None
    local.enough()
    out, _ = follower.communicate(timeout=60)
    assert (follower.returncode, out) == (0, "")
    assert local.states() == {"first": "COMPLETED"}


def test_ctrl_c_leaves_the_job_and_says_so(local: Local) -> None:
    waiting = local.popen("submit", "first", "--wait", "--set", "first.seconds=600")
    process = local.running("first-1/first")
    assert waiting.stderr is not None
    assert any("RUNNING" in line for line in waiting.stderr), "it waits"
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert "error: no longer waiting; first-1 goes on\n  try: hpc status first-1, or hpc cancel first-1" in err
    assert process_start(process), "it goes on"
    local.enough()
    until(lambda: process_start(process) is None, "the stage's own end")
    assert local.states() == {"first": "COMPLETED"}


def test_kill_between_two_submissions_leaves_a_run_that_submit_completes(local: Local) -> None:
    before = (
        "import os, signal\nfrom hpc.login import batch\nreal = batch.submit_local\n"
        "def once(placed):\n"
        "    if placed.name == 'second': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(placed)\n"
        "batch.submit_local = once"
    )
    local.hpc("submit", "pipeline", before=before, code=-9)
    assert local.states()["second"] == local.states()["third"] == "NOT_SUBMITTED"
    assert "submit again to complete the run" in local.hpc("status").stdout
    local.hpc("submit", "pipeline", "--wait")
    assert local.states("pipeline-1") == dict.fromkeys(CHAIN, "COMPLETED")
    assert local.read("pipeline-1/first/job.json")["attempt"] == 1, "it was not run twice"


def test_what_only_slurm_hears_is_2_without_slurm_and_nothing_starts(local: Local) -> None:
    (local.folder / "sites").mkdir()
    (local.folder / "sites" / "mine.toml").write_text('partition = "gpu"\n')  # `extends` was forgotten
    for options, what in {
        ("--site", "mine"): f"{local.folder}/sites/mine.toml: site 'mine' has no Slurm, and site.partition",
        ("-p", "gpu"): "--partition: site 'local' has no Slurm, and site.partition",
        ("-A", "me", "--site", "local"): "--account: site 'local' has no Slurm, and site.account",
        ("--set", "first.sbatch={nice=1}"): "--set first.sbatch={nice=1}: site 'local' has no Slurm, and first.sbatch",
    }.items():
        done = local.hpc("submit", "first", *options, code=2)
        assert f'error: {what} would do nothing\n  try: write extends = "slurm"' in done.stderr
    assert not (local.folder / "runs").exists()
    assert "no Slurm, and site.partition" in local.hpc("doctor", "--site", "mine", code=1).stdout
    # said in so many words, this machine it is: a cluster's project is tried here
    local.hpc("plan", "first", "--site", "local", "--set", "first.sbatch={nice=1}")
    local.hpc("plan", "first", "--site", "mine", "--set", "site.scheduler=local")


def test_two_at_once_run_every_stage_once(local: Local) -> None:
    both = [local.popen("submit", "first", "--set", "first.seconds=0.5") for _ in range(2)]
    ends = [(p.communicate(timeout=60)[1], p.returncode) for p in both]
    assert 0 in [code for _, code in ends], ends
    assert not [err for err, _ in ends if "Traceback" in err]
    local.hpc("submit", "first", "--set", "first.seconds=0.5", "--wait")
    assert list(local.folder.glob("runs/first-1/first/attempt-*")) == [local.folder / "runs/first-1/first/attempt-1"]
    assert len(list(local.folder.glob("runs/first-*"))) == 1


# ---- surroundings


def test_variables_of_an_allocation_do_not_matter(local: Local) -> None:
    inside = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SBATCH_PARTITION": "none", "SUBMITIT_EXECUTOR": "slurm"}
    local.hpc("submit", "first", "--wait", env=inside)
    assert local.states() == {"first": "COMPLETED"}


def test_python_path_and_home_of_the_user_do_not_reach_the_stage(local: Local) -> None:
    local.hpc("submit", "first", "--wait", "--set", "first.env=yes", env={"MY_OWN": "1", "HF_TOKEN": "hf_secret"})
    seen = local.read("first-1/first/manifest.json")["metrics"]["env"]
    assert seen["PYTHONPATH"] == str(local.folder / "runs/first-1/code")
    assert "MY_OWN" not in seen
    assert seen["HF_TOKEN"] == "hf_secret", "the stage may need it"
    launch = local.read("first-1/first/attempt-1/launch.json")
    assert launch["env"]["HF_TOKEN"] == "(not shown)"


def test_project_with_blanks_and_korean_letters_in_its_path(tmp_path: Path, packages: Path) -> None:
    made = Local(tmp_path / '내 프로젝트, "it\'s"', packages)
    try:
        made.hpc("submit", "first", "--wait")
        assert made.states() == {"first": "COMPLETED"}
    finally:
        made.end()


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ("hpc.toml", "not a directory"),
        ("/proc/none", "cannot be written"),
        ("a:b", "a colon in its name"),
        ("50%j", "a percent sign in its name"),
    ],
)
def test_runs_folder_that_cannot_be_written_is_2(local: Local, runs: str, said: str) -> None:
    done = local.hpc("submit", "first", code=2, env={"HPC_RUNS": runs})
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert "try: " in done.stderr


def test_full_disk_is_1_and_leaves_nothing_half(local: Local) -> None:
    """A file system of 64 KiB: the snapshot of the code does not fit."""
    (local.folder / "runs").mkdir()
    words = [sys.executable, "-m", "hpc", "submit", "first"]
    script = 'mount -t tmpfs -o size=64k tmpfs runs || exit 99; "$@"; code=$?; find runs -mindepth 1; exit $code'
    argv = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else []), "sh", "-c", script, "sh", *words]
    done = subprocess.run(argv, cwd=local.folder, env=local.env(), capture_output=True, text=True)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"FULL DISK NOT TESTED: no mount namespaces here: {done.stderr}")
    assert done.returncode == 1, done.stderr
    assert "no space left on device" in done.stderr
    assert "make room" in done.stderr
    assert [line for line in done.stdout.splitlines() if ".cache" not in line] == []


def test_missing_environment_is_3_and_names_what_to_build(local: Local) -> None:
    (local.folder / "venv" / "bin" / "python3").unlink()
    done = local.hpc("submit", "first", code=3)
    assert "the environment 'train' is not there" in done.stderr
    assert "hpc images build train" in done.stderr
    assert not (local.folder / "runs" / "first-1").exists()


NO_RIGHTS = "import ctypes; ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())"
"""Not even root's."""


def test_environment_behind_a_closed_folder_is_3_and_named(local: Local) -> None:
    closed = local.folder / "venv" / "bin"
    closed.chmod(0)
    try:
        done = local.hpc("plan", "first", code=3, before=NO_RIGHTS)
        checks = local.hpc("doctor", code=1, before=NO_RIGHTS).stdout
    finally:
        closed.chmod(0o755)
    said = f"the environment 'train' cannot be read: {closed}/python3: Permission denied"
    assert f"error: {said}\n  try: its owner must open it" in done.stderr
    assert f"missing environment train: {said}\n" in checks
    assert "ok      settings" in checks


def test_file_that_is_no_image_is_3(local: Local) -> None:
    page = local.folder / "train.sif"
    toml = (local.folder / "hpc.toml").read_text()
    (local.folder / "hpc.toml").write_text(toml.replace('"venv"', '"train.sif"'))
    page.write_text("<html>not found</html>\n" * 100)
    done = local.hpc("submit", "first", code=3)
    assert f"error: the environment 'train' is {page}, and that is no image\n  try: hpc images build" in done.stderr
    assert not (local.folder / "runs" / "first-1").exists()


def test_end_that_is_not_written_whole_counts_as_none(local: Local) -> None:
    local.hpc("submit", "first", "--wait")
    (local.folder / "runs/first-1/first/attempt-1/outcome.json").write_text("{}")
    assert local.states() == {"first": "LOST"}
    manifest = local.folder / "runs/first-1/first/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "metrics": None}))
    local.hpc("report", "first-1")


def test_note_is_told_once(local: Local) -> None:
    settings = ("--set", "pipeline.stages=build", "--set", "build.engine=llmapi")
    for words in (("plan",), ("submit", "pipeline", "--dry-run"), ("submit", "pipeline")):
        done = local.hpc(*words, *settings)
        assert (done.stdout + done.stderr).count("note: build: nothing to do") == 1, words
    assert local.json("submit", "pipeline", "--dry-run", *settings)["notes"] == local.json("plan", *settings)["notes"]


def test_module_that_is_no_stage_is_named(local: Local, tmp_path: Path) -> None:
    local.packages = shutil.copytree(local.packages, tmp_path / "packages")
    for name, text in {"helper": "", "broken": "def (", "heavy": "import not_installed"}.items():
        file = local.packages / "stages" / f"{name}.py"
        file.write_text(text)
        done = local.hpc("stages", code=1)
        assert done.stderr.startswith(f"error: stages/{name}.py ")
        file.unlink()


def test_terminal_without_our_letters_is_no_error(local: Local) -> None:
    local.hpc("submit", "first", "--set", "first.seconds=600")
    local.running("first-1/first")
    until(lambda: (local.json("status")["stages"][0]["done"] or 0) > 0, "progress")
    assert "RUNNING" in local.hpc("status", env={"PYTHONIOENCODING": "latin-1"}).stdout


def test_argument_that_is_not_utf8_is_2(local: Local) -> None:
    assert "not UTF-8" in local.hpc("submit", "first", "--set", "first.message=caf\udce9", code=2).stderr


def test_local_jobs_id_is_its_own_inside_an_allocation(local: Local) -> None:
    local.hpc("submit", "first", "--wait", env={"SLURM_JOB_ID": "4711"})
    outcome = local.read("first-1/first/attempt-1/outcome.json")
    assert outcome["job_id"] == local.read("first-1/first/job.json")["job_id"]


def test_plan_shows_no_secret_of_the_site(local: Local) -> None:
    (local.folder / "sites").mkdir()
    (local.folder / "sites" / "s.toml").write_text('extends = "local"\nenv = { NGC_API_KEY = "s3cret" }\n')
    assert "s3cret" not in local.hpc("plan", "--site", "s", "--json").stdout


def test_secret_of_the_site_is_for_its_owner_alone(local: Local) -> None:
    (local.folder / "sites").mkdir()
    (local.folder / "sites" / "s.toml").write_text('extends = "local"\nenv = { NGC_API_KEY = "s3cret" }\n')
    local.hpc("submit", "first", "--site", "s", "--wait")
    holding = [f for f in local.folder.glob("runs/**/*") if f.is_file() and b"s3cret" in f.read_bytes()]
    assert {f.parent.name for f in holding} == {"scheduler"}
    assert [f.parent.stat().st_mode & 0o077 for f in holding] == [0] * len(holding)
    assert local.hpc("logs", "first-1").stdout


def test_shell_runs_beside_the_stage_in_its_venv(local: Local) -> None:
    local.hpc("submit", "first", "--set", "first.seconds=600")
    local.running("first-1/first")
    done = local.hpc("shell", "--", "sh", "-c", "pwd; command -v python3; echo $PYTHONNOUSERSITE; exit 5", code=5)
    assert done.stdout.split() == [f"{local.folder}/runs/first-1/first", f"{local.folder}/venv/bin/python3", "1"]
    assert (done.stderr, local.states()) == ("", {"first": "RUNNING"})
    refused = local.hpc("shell", "first-1", "--node", "dgx01", "--", "true", code=2)
    assert "runs on this machine, not on dgx01" in refused.stderr
    local.hpc("cancel")
    ended = local.hpc("shell", "first-1/first", "--", "true", code=7)
    assert ended.stderr == (
        "error: first-1/first is CANCELLED: there is no container to enter\n"
        "  try: `hpc status first-1` shows where it stands\n"
    )


def test_top_of_a_stage_without_gpus_says_so(local: Local) -> None:
    local.hpc("submit", "first", "--set", "first.seconds=600")
    local.running("first-1/first")
    done = local.hpc("top")
    assert (done.stdout, done.stderr[:41]) == ("", "no running stage of yours holds a GPU; `h")


def test_top_shows_the_gpus_of_this_machine(local: Local) -> None:
    path = f"{ROOT}/tests/cluster/stubs:{os.environ['PATH']}"
    (local.folder / "sites").mkdir()
    (local.folder / "sites" / "s.toml").write_text('extends = "local"\ngpus = "gpus_per_node"\n')
    gpus = ("--site", "s", "--set", "first.resources.gpus_per_node=1", "--set", "first.seconds=600")
    local.hpc("submit", "first", *gpus)
    local.running("first-1/first")
    (row,) = json.loads(local.hpc("top", "first", "--json", env={"PATH": path, "CUDA_VISIBLE_DEVICES": "5"}).stdout)[
        "gpus"
    ]
    assert (row["run"], row["stage"], row["node"]) == ("first-1", "first", os.uname().nodename)
    assert (row["index"], row["utilization"]) == (0, 50.0), "the job's GPU, not that of this shell"


def test_a_pipeline_with_nothing_to_do_says_so_and_makes_no_run(local: Local) -> None:
    (local.folder / "hpc.toml").write_text('[pipeline]\nstages = ["convert", "build"]\n[build]\nengine = "llmapi"\n')
    done = local.hpc("submit", "pipeline")
    assert "build: nothing to do, llmapi serves the model as it is" in done.stderr
    assert json.loads(local.hpc("submit", "pipeline", "--json").stdout)["stages"] == []
    assert not list(local.folder.glob("runs/*/run.json"))


# ---- what is read and what is kept


def test_input_that_changed_while_its_stage_waited_is_6_and_counts_as_itself_once_submitted_again(
    local: Local,
) -> None:
    given, folder = local.folder / "given.jsonl", local.folder / "folder"
    (folder / "sub").mkdir(parents=True)
    given.write_text("planned with\n")
    (folder / "sub" / "large").write_bytes(bytes(1 << 17))
    asked = ("pipeline", "--set", "first.seconds=2", "--set", "third.files=['given.jsonl', 'folder']")
    local.hpc("submit", *asked)
    local.running()
    given.write_text("another\n")
    (folder / "renewed").write_bytes(bytes(1 << 17))
    os.replace(folder / "renewed", folder / "sub" / "large")  # the same content: it passes
    until(lambda: local.states("pipeline-1")["third"] == "FAILED", "its end")
    row = local.json("status", "pipeline-1")["stages"][2]
    assert (row["exit_code"], row["reason"]) == (6, f"{given} has changed since third was submitted")
    assert row["hint"].startswith("submit again: what it holds now gets a result of its own")
    assert not (local.folder / "runs/pipeline-1/third/manifest.json").exists()
    found = local.json("plan", *asked)
    actions = [s["action"] for s in found["stages"]]
    assert (found["run"], actions) == ("pipeline-2", ["done in pipeline-1", "done in pipeline-1", "submit"])
    local.hpc("submit", *asked, "--wait")
    given.write_text("planned with\n")
    local.hpc("submit", *asked, "--wait")
    assert local.states("pipeline-1")["third"] == "COMPLETED", "with the former content the first run goes on"
    keys = [local.read(f"pipeline-{number}/third/manifest.json")["key"] for number in (1, 2)]
    assert keys[0] != keys[1]


def test_result_that_was_removed_is_made_again_where_it_is_needed(local: Local) -> None:
    local.hpc("submit", "pipeline", "--wait")
    runs = local.folder / "runs"
    shutil.rmtree(runs / "pipeline-1/second/out")
    assert [s["reason"].partition(":")[0] for s in local.json("status")["stages"]] == ["", "its result is gone", ""]
    assert [s["action"] for s in local.json("plan")["stages"]] == ["done"] * 3, "nothing needs it"
    other = ("pipeline", "--set", "third.message=other")
    actions = [s["action"] for s in local.json("plan", *other)["stages"]]
    assert actions == ["done in pipeline-1", "submit", "submit"]
    local.hpc("submit", "second", "--wait")
    assert local.states("pipeline-1") == dict.fromkeys(CHAIN, "COMPLETED")
    assert (runs / "pipeline-1/second/attempt-2").exists()
    assert (runs / "pipeline-1/second/out/result.json").exists()
    local.hpc("submit", *other, "--wait")
    assert local.read("pipeline-2/second/job.json")["reused"] == "pipeline-1"
    (runs / "pipeline-1/third/out/result.json").unlink()  # of several outputs it may be one
    local.hpc("submit", "pipeline", "--wait")
    assert (runs / "pipeline-1/third/out/result.json").exists()


def test_results_of_a_project_that_moved_are_there(local: Local) -> None:
    local.hpc("submit", "first", "--wait")
    shutil.copytree(local.folder / "runs", local.folder / "elsewhere", symlinks=True)
    shutil.rmtree(local.folder / "runs")
    found = json.loads(local.hpc("plan", "first", "--json", env={"HPC_RUNS": "elsewhere"}).stdout)
    assert [s["action"] for s in found["stages"]] == ["done"]
