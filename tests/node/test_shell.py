"""A program beside a stage: started as the stage was, without its secrets, from what launch.json says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc.core import imagelock, rundir
from hpc.core.digest import sha256
from hpc.core.rundir import StageDir
from hpc.node import shell
from hpc.node.launch import PASSES, Bind, Launch, container, process_env, venv, without_secrets

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path("/runs/r-1/train")
INNER = ("python3", "-m", "hpc.inside.runner", "train", "c", "a")
JOB = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "3", "HF_TOKEN": "hf_x", "HTTPS_PROXY": "http://me:secret@p:1",
       "TERM": "dumb", "HOME": "/home/alice", "PATH": "/usr/bin"}  # fmt: skip


def document(launch: Launch) -> dict[str, Any]:
    """launch.json as the node writes it."""
    return {"argv": list(launch.argv), "env": without_secrets(process_env(launch, JOB))}


def sif() -> Launch:
    binds = [Bind("/runs/r-1", writable=True), Bind("/exec,--pwd")]
    return container(program="apptainer", image="/scratch/x.sif", inner=INNER, env={"A": "1"}, passes=PASSES,
                     binds=binds, gpus=True, cwd="/runs/r-1")  # fmt: skip


def test_container_is_the_stages_own_but_for_folder_and_program() -> None:
    argv, _ = shell.start(document(sif()), FOLDER, ["ls", "-l"], {})
    assert argv[-6:] == ("/scratch/x.sif", "sh", "-c", "trap '' USR2; exec \"$@\"", "sh", "ls", "-l")[-6:]
    assert argv[argv.index("--pwd") + 1] == str(FOLDER)
    place = sif().argv.index("/scratch/x.sif")
    assert [a for a in argv[: place + 1] if a != str(FOLDER)] == [
        a for a in sif().argv[: place + 1] if a != "/runs/r-1"
    ]


def test_environment_is_the_stages_without_its_secrets_and_with_this_nodes_gpus_and_terminal() -> None:
    _, env = shell.start(document(sif()), FOLDER, [], {"CUDA_VISIBLE_DEVICES": "5", "TERM": "xterm", "X": "no"})
    inside = {k.removeprefix("APPTAINERENV_"): v for k, v in env.items() if k.startswith("APPTAINERENV_")}
    assert inside == {"A": "1", "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "5", "TERM": "xterm"}
    assert {"HOME": "/home/alice", "PATH": "/usr/bin"}.items() <= env.items()
    assert "X" not in env


def test_step_that_sees_no_gpus_keeps_those_of_the_stage() -> None:
    _, env = shell.start(document(sif()), FOLDER, [], {})
    assert env["APPTAINERENV_CUDA_VISIBLE_DEVICES"] == "3"


def test_venvs_programs_come_first() -> None:
    launch = venv(folder="/venvs/train", inner=INNER, env={"A": "1"}, passes=PASSES)
    argv, env = shell.start(document(launch), FOLDER, ["python3"], {"TERM": "xterm"})
    assert argv[0] == "sh"
    assert env["PATH"].startswith("/venvs/train/bin:")
    assert (env["A"], env["TERM"], env["SLURM_JOB_ID"]) == ("1", "xterm", "7")
    assert "HF_TOKEN" not in env


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A stage of site local at work, in a venv."""
    folder = tmp_path / "run-1" / "train"
    (folder / "attempt-1").mkdir(parents=True)
    launch = venv(folder="/usr", inner=INNER, env={"OWN": "stage's"}, passes=())
    (folder / "attempt-1" / "launch.json").write_text(json.dumps(document(launch)))
    return folder


def run(stage: Path, *program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "hpc.node.shell", str(stage), "1", *program]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=30, **options)


def test_program_stands_in_the_stages_folder_and_gives_its_exit_code(stage: Path) -> None:
    done = run(stage, "sh", "-c", "pwd; echo $OWN; exit 5")
    assert (done.stdout, done.returncode) == (f"{stage}\nstage's\n", 5)


def test_program_that_a_signal_ends_gives_the_shells_code(stage: Path) -> None:
    assert run(stage, "sh", "-c", "kill -9 $$").returncode == 137


def test_shell_reads_what_is_piped_into_it(stage: Path) -> None:
    done = run(stage, input="echo $OWN\nexit 3\n")
    assert (done.stdout, done.returncode) == ("stage's\n", 3)


def test_program_that_is_not_there(stage: Path) -> None:
    done = run(stage, "no-such-program")
    assert done.returncode == 127
    assert "no-such-program: not found" in done.stderr


def test_stage_that_has_not_started(stage: Path) -> None:
    (stage / "attempt-1" / "launch.json").unlink()
    done = run(stage, "true")
    assert (done.returncode, done.stderr) == (1, f"{stage}: its container has not been started\n")


def test_warning_before_the_time_limit_ends_neither_shell_nor_program(stage: Path) -> None:
    argv = [sys.executable, "-m", "hpc.node.shell", str(stage), "1", "sh", "-c", "echo up; read line; echo $line"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    os.killpg(process.pid, signal.SIGUSR2)
    time.sleep(0.2)
    assert process.communicate("still here\n", timeout=10)[0] == "still here\n"
    assert process.returncode == 0


def test_image_that_has_become_another_one_is_not_entered(tmp_path: Path) -> None:
    image = tmp_path / "x.sif"
    image.write_bytes(b"an image")
    stage = StageDir(tmp_path / "r-1" / "train")
    stage.attempt(1).path.mkdir(parents=True)
    planned = {"path": str(image), "digest": sha256(image), "stat": imagelock.look(image)}
    rundir.write_json(stage.config, {"environment": planned})
    # in place of Apptainer a program that only says that it was started
    rundir.write_json(stage.attempt(1).launch, {"argv": ["/bin/echo", "exec", str(image), *INNER], "env": {}})

    def enter() -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "hpc.node.shell", str(stage.path), "1", "true"]
        return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)

    assert enter().returncode == 0
    image.write_bytes(b"an imagE")
    done = enter()
    assert done.returncode == 6
    assert planned["digest"] in done.stderr
    assert sha256(image) in done.stderr
    assert done.stdout == ""
