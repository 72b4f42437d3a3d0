"""Submitting, on a real Slurm: what is shown is what is used, and no trap of sbatch or submitit catches a user."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import probe

from .project import Project, jobs
from .test_states import ended, submit


def test_dry_run_shows_byte_for_byte_what_submit_uses(project: Project) -> None:
    project.write("hpc.toml", project.folder.joinpath("hpc.toml").read_text() + "[first]\nmessage = \"a, 'b' $(id)\"\n")
    shown = {s["stage"]: s for s in project.json("submit", "pipeline", "--dry-run")["stages"]}
    assert jobs(project) == [], "a dry run queues nothing"
    assert not (project.folder / "runs" / "pipeline-1").exists()
    run = submit(project, "pipeline")
    project.until(ended("first", "second", "third"), run)
    ids = {name: row["job_id"] for name, row in project.states(run).items()}
    for name, stage in shown.items():
        folder = project.folder / "runs" / run / name
        (script,) = folder.glob(f"attempt-1/scheduler/{ids[name]}_submission.sh")
        expected = stage["script"]
        for other, job_id in ids.items():
            expected = expected.replace(f"@{other}", job_id)
        assert script.read_text() == expected
        assert script.parent.stat().st_mode & 0o077 == 0, "what is pickled may hold secrets of the site's env"
        used = json.loads((folder / "attempt-1" / "launch.json").read_text())
        assert used["argv"] == stage["argv"]
        assert json.loads((folder / "config.json").read_text()) == stage["config"]
        added = {k: v for k, v in used["env"].items() if k.startswith("APPTAINERENV_")}
        assert stage["environment"].items() <= added.items()
        job_only = {k.removeprefix("APPTAINERENV_") for k in added.keys() - stage["environment"].keys()}
        assert all(k.startswith(("SLURM", "CUDA", "TZ", "PMI")) for k in job_only), job_only
    assert "afterok:@first" in shown["second"]["script"]


COUNT_SLEEPS = """
import os, time
real = time.sleep
def sleep(seconds):
    with open(os.environ["SLEPT"], "a") as file:
        print(seconds, file=file)
    real(seconds)
time.sleep = sleep
with open(os.environ["SLEPT"], "a") as file:
    print("watched", file=file)
"""


def test_stages_are_not_throttled_to_five_a_second(project: Project) -> None:
    """submitit would sleep for 0.2 s between two. How long all else takes is the machine's affair."""
    watch = project.write("watch/sitecustomize.py", COUNT_SLEEPS)
    slept = project.write("slept", "")
    env = {"PYTHONPATH": str(watch.parent), "SLEPT": str(slept)}
    project.hpc("submit", "pipeline", "--set", "first.message=throttle", env=env)
    begin, *seconds = slept.read_text().split()
    assert begin == "watched", "else this test proves nothing"
    assert max(map(float, seconds), default=0) < 0.2


def test_submitting_from_inside_an_allocation_asks_for_what_the_plan_says(project: Project) -> None:
    hpc = str(project.venv / "bin" / "hpc")
    inside = ["srun", "-p", "debug", "--gres=gpu:4", "-c", "3", "-t", "9", hpc]
    leaking = {"SBATCH_TIMELIMIT": "7", "SBATCH_PARTITION": "mig"}
    project.cluster.run("alice", *inside, "submit", "first", "--wait", cwd=project.folder, env=leaking, timeout=180)
    row = project.states()["first"]
    form = ["sacct", "-n", "-P", "-X", "-j", row["job_id"], "-o", "Partition,ReqTRES,Timelimit,NCPUS"]
    deadline = time.monotonic() + 60
    while "batch" not in (told := project.cluster.run("alice", *form).stdout):
        assert time.monotonic() < deadline, told
        time.sleep(0.5)
    partition, asked, limit, _ = told.strip().split("|")
    assert (partition, limit) == ("batch", "00:05:00")
    assert "gres" not in asked
    assert "cpu=1" in asked.split(",")


def test_environment_arrives_unchanged_and_nothing_else_leaks(project: Project) -> None:
    site = project.folder / "sites" / "slurm-test.toml"
    odd = "a,b=c 'q' \"d\" $(id -u) `id` \\ 한글"
    project.write(
        "sites/slurm-test.toml", site.read_text() + f"env = {{ ODD = {json.dumps(odd, ensure_ascii=False)} }}\n"
    )
    host = {
        "PYTHONPATH": "/nowhere",
        "VIRTUAL_ENV": "/nowhere",
        "MY_SECRET": "x",
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "hf_secret",
    }
    settings = ("--set", "first.env=yes", "--set", "first.resources.gpus_per_node=1")
    project.hpc("submit", "first", *settings, "--wait", env=host)
    run = project.states()["first"]["run"]
    folder = project.folder / "runs" / run
    metrics = json.loads((folder / "first" / "manifest.json").read_text())["metrics"]
    seen = metrics["env"]
    assert seen["ODD"] == odd
    assert seen["PYTHONPATH"] == str(folder / "code")
    assert seen["NCCL_DEBUG"] == "INFO"
    assert seen["HF_TOKEN"] == "hf_secret"
    assert seen["CUDA_VISIBLE_DEVICES"] == seen["SLURM_JOB_GPUS"] in list("01234567"), "the one that Slurm has given"
    assert seen["SLURM_JOB_ID"]
    assert not {"VIRTUAL_ENV", "MY_SECRET"} & seen.keys()
    # the token is in no file that hpc or submitit wrote, nor in the job's record
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "manifest.json":  # the probe itself wrote its environment there
            assert b"hf_secret" not in file.read_bytes(), file
    job = project.states(run)["first"]["job_id"]
    assert "hf_secret" not in project.cluster.run("alice", "scontrol", "show", "job", "-d", job).stdout


def test_odd_places_and_an_odd_host_change_nothing(project: Project, workdir: Path, probes: list[str]) -> None:
    """Blanks, commas, quotes and Korean in every path, a colon in what is bound; a host that is full of traps."""
    odd = Project(project.cluster, workdir / "한글 a,b \"c\" 'd' $(id)", project.venv)
    for name in ("hpc.toml", "sites/slurm-test.toml"):
        odd.write(name, (project.folder / name).read_text())
    odd.write("bound 나/x:y/file", "seen")
    site = odd.folder / "sites" / "slurm-test.toml"
    bound = json.dumps(str(odd.folder / "bound 나"), ensure_ascii=False)
    setup = "setup = ['export PYTHONHOME=/nowhere VIRTUAL_ENV=/nowhere XDG_RUNTIME_DIR=/nowhere HOME=$PWD/home']"
    site.write_text(f"{site.read_text()}binds = [{bound}]\n{setup}\n")
    odd.write("home/.local/lib/python3.11/site-packages/trap.py", "")
    odd.hpc("submit", "first", "--wait", "--set", "first.env=yes")
    run = odd.states()["first"]["run"]
    seen = json.loads((odd.folder / "runs" / run / "first" / "manifest.json").read_text())["metrics"]["env"]
    assert not {"PYTHONHOME", "VIRTUAL_ENV", "XDG_RUNTIME_DIR"} & seen.keys()
    assert seen["PYTHONNOUSERSITE"] == "1"
    for cache in ("HF_HOME", "XDG_CACHE_HOME"):
        assert seen[cache].startswith(str(odd.folder / "runs" / ".cache"))
    shown = odd.hpc("submit", "second", "--dry-run").stdout
    assert str(odd.folder / "bound 나") in shown


def wrapped_sbatch(project: Project, body: str) -> dict[str, str]:
    """An environment in which `sbatch` is a script around the real one."""
    script = project.write("bin/sbatch", f"#!/bin/bash\n{body}\n")
    script.chmod(0o755)
    return {"PATH": f"{script.parent}:/usr/local/bin:/usr/bin:/bin", "COUNT": str(project.folder / "count")}


KILLED_BEFORE = (
    'echo x >>"$COUNT"; [ "$(wc -l <"$COUNT")" = 2 ] && { kill -9 $PPID; exit 1; }; exec /usr/bin/sbatch "$@"'
)
KILLED_AFTER = 'echo x >>"$COUNT"; /usr/bin/sbatch "$@"; [ "$(wc -l <"$COUNT")" = 2 ] && kill -9 $PPID; exit 0'


@pytest.mark.parametrize(("body", "second_state"), [(KILLED_BEFORE, "NOT_SUBMITTED"), (KILLED_AFTER, "PENDING")])
def test_killed_between_two_submissions_status_tells_and_submit_completes(
    project: Project, body: str, second_state: str
) -> None:
    settings = ("pipeline", "--set", "first.sbatch={hold = true}")  # nothing ends while it is looked at
    killed = project.hpc("submit", *settings, env=wrapped_sbatch(project, body), check=False)
    assert killed.returncode == -signal.SIGKILL
    found = project.states()
    assert found["first"]["state"] == "PENDING"
    assert found["second"]["state"] == second_state
    assert found["third"]["state"] == "NOT_SUBMITTED"
    completed = project.hpc("submit", *settings)
    assert "third submitted" in completed.stdout
    run = found["first"]["run"]
    attempt = 2 if second_state == "NOT_SUBMITTED" else 1
    queued = sorted(comment.split(":")[1] for comment in jobs(project))
    assert queued == [f"{run}/first/1", f"{run}/second/{attempt}", f"{run}/third/1"], "each stage is queued once"
    project.cluster.run("alice", "scontrol", "release", found["first"]["job_id"])
    found = project.until(ended("first", "second", "third"), run)
    assert [s["state"] for s in found.values()] == ["COMPLETED"] * 3


def test_a_lost_answer_of_sbatch_makes_no_second_job(project: Project) -> None:
    body = (
        '/usr/bin/sbatch "$@" >/dev/null;'
        ' echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    )
    project.hpc("submit", "first", "--set", "first.sbatch={hold = true}", env=wrapped_sbatch(project, body))
    (job,) = jobs(project, "%i")
    project.cluster.run("alice", "scontrol", "release", job)
    assert project.until(ended("first"))["first"]["state"] == "COMPLETED"


def enough(row: dict[str, Any]) -> None:
    """The stage that sleeps is to come to its end."""
    (Path(row["folder"]) / "checkpoints" / probe.ENOUGH).touch()


def test_ctrl_c_while_waiting_leaves_the_job(project: Project) -> None:
    waiting = project.popen("submit", "first", "--set", "first.seconds=200", "--wait")
    assert waiting.stderr is not None
    while "first RUNNING" not in (line := waiting.stderr.readline()):  # so it has begun to wait
        assert line, waiting.communicate()
    os.kill(waiting.pid, signal.SIGINT)
    _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert "goes on" in said
    row = project.until(lambda f: bool(f["first"]["done"]))["first"]
    assert row["state"] == "RUNNING"
    enough(row)
    assert project.until(ended("first"))["first"]["state"] == "COMPLETED"


def test_each_attempt_has_its_own_folder_so_no_stale_result_is_read(project: Project) -> None:
    for _ in range(2):
        project.hpc("submit", "first", "--set", "first.exit_code=3", "--wait", check=False)
    row = project.states()["first"]
    assert (row["attempt"], row["state"]) == (2, "FAILED")
    folders = [p.parent.name for p in Path(row["folder"]).glob("attempt-*/scheduler")]
    assert sorted(folders) == ["attempt-1", "attempt-2"]


def test_a_requeued_job_goes_on_and_keeps_its_earlier_end(project: Project) -> None:
    run = submit(project, "first", "--set", "first.seconds=200")
    row = project.until(lambda f: f["first"]["state"] == "RUNNING" and f["first"]["done"], run)["first"]
    project.cluster.run("alice", "scontrol", "requeue", row["job_id"])
    enough(row)
    assert project.until(ended("first"), run, timeout=180)["first"]["state"] == "COMPLETED"
    assert list(Path(row["folder"]).glob("attempt-1/outcome-0.json"))


def test_scancel_by_hand_is_seen_as_cancelled(project: Project) -> None:
    run = submit(project, "first", "--set", "first.seconds=60", "--time", "60")
    row = project.until(lambda f: f["first"]["state"] == "RUNNING", run)["first"]
    project.cluster.run("alice", "scancel", row["job_id"])
    assert project.until(ended("first"), run)["first"]["state"] == "CANCELLED"
