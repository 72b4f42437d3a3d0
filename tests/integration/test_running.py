"""`hpc shell` and `hpc top` beside a running stage: a real step, a real container, a real terminal; nothing stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from hpc.node.shield import helpers
from tests.support import terminal

from .project import Project
from .test_states import ended, submit

STUBS = Path(__file__).resolve().parent.parent / "cluster" / "stubs"
GPU = ("--set", "first.resources.gpus_per_node=1")
SHELL, GPUS, SRUN = "hpc.node.shell", "hpc.node.gpus", "srun --overlap"


def processes(word: str, project: Project) -> set[int]:
    """Those whose command line has the word, and who were started with a path of this project."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            if word.encode() in command and os.fsencode(project.folder) in command + (folder / "environ").read_bytes():
                found.add(int(folder.name))
    return found


def on_node(word: str, project: Project) -> int:
    """The one process of that kind on the node: not srun, whose command line names it too."""
    (pid,) = processes(word, project) - processes(SRUN, project)
    return pid


def fuse_helper(pid: int) -> int:
    """The FUSE helper of the container that this process has started."""
    (container,) = (p for p in children(pid) if helpers(p))
    (helper,) = helpers(container)
    return helper


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def first_srun(project: Project) -> int:
    """The one that hpc has started: srun makes another of itself."""
    found = processes(SRUN, project)
    (pid,) = found - {child for one in found for child in children(one)}
    return pid


def gone(*pids: int) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def until(wanted: Callable[[], object], what: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not wanted():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


class Terminal(terminal.Terminal):
    """A command of alice's on a terminal of her own."""

    def __init__(self, project: Project, *arguments: str, env: dict[str, str] | None = None) -> None:
        super().__init__(
            partial(
                project.cluster.popen, "alice", "/usr/bin/python3", "-c", terminal.CONTROLLING,
                str(project.venv / "bin" / "hpc"), *arguments, cwd=project.folder, env={"TERM": "xterm", **(env or {})},
            )
        )  # fmt: skip


@pytest.fixture
def at_work(project: Project) -> str:
    """A run whose stage is at work with one GPU; another one beside it, so that its number is not always 0."""
    other = submit(project, "first", "--set", "first.seconds=300", *GPU, "--set", "first.message=other")
    run = submit(project, "first", "--set", "first.seconds=300", *GPU)
    for one in (other, run):
        project.until(lambda f: f["first"]["state"] == "RUNNING" and f["first"]["done"], one)
    return run


def jobs_own(project: Project, run: str) -> dict[str, str]:
    launch = project.folder / "runs" / run / "first" / "attempt-1" / "launch.json"
    env: dict[str, str] = json.loads(launch.read_text())["env"]
    return {name.removeprefix("APPTAINERENV_"): value for name, value in env.items()}


def test_program_runs_in_the_stages_container_on_its_node(project: Project, at_work: str) -> None:
    node = project.states(at_work)["first"]["node"]
    script = "hostname; pwd; echo $APPTAINER_NAME; echo $CUDA_VISIBLE_DEVICES $SLURM_JOB_ID; exit 5"
    done = project.hpc("shell", at_work, "--", "sh", "-c", script, check=False)
    assert (done.returncode, done.stderr) == (5, "")
    own = jobs_own(project, at_work)
    assert done.stdout.splitlines() == [
        node,
        f"{project.folder}/runs/{at_work}/first",
        "base.sif",
        f"{own['CUDA_VISIBLE_DEVICES']} {own['SLURM_JOB_ID']}",
    ]
    wrong = project.hpc("shell", at_work, "--node", "mig01", "--", "true", check=False)
    assert (wrong.returncode, "its job is not on this node" in wrong.stderr) == (2, True)
    project.folder.chmod(0o755)
    others = project.hpc("shell", at_work, "--", "true", user="bob", check=False)
    assert others.returncode == 7


def test_terminal_in_the_container(project: Project, at_work: str) -> None:
    node = project.states(at_work)["first"]["node"]
    terminal = Terminal(project, "shell", at_work)
    terminal.until(f"{at_work}/first@{node}:")
    terminal.type("echo at-$(hostname) in-$APPTAINER_NAME gpu-$CUDA_VISIBLE_DEVICES term-$TERM\n")
    terminal.until(f"at-{node} in-base.sif gpu-{jobs_own(project, at_work)['CUDA_VISIBLE_DEVICES']} term-xterm")
    terminal.type("grep PRETTY /etc/os-release; tty\n")
    terminal.until('PRETTY_NAME="Debian GNU/Linux 12')
    terminal.until("/dev/pts/")
    terminal.type("sleep 61.5\n")
    until(lambda: processes("sleep 61.5", project), "it sleeps")
    terminal.type("\x03")
    terminal.type("echo interrupted-$?\n")
    terminal.until("interrupted-130")
    shell = on_node(SHELL, project)
    helper = fuse_helper(shell)
    terminal.type("exit 4\n")
    assert terminal.end() == 4
    until(lambda: gone(shell, helper), "nothing is left of it")
    assert project.states(at_work)["first"]["state"] == "RUNNING"


def test_warning_signal_ends_no_shell(project: Project, at_work: str) -> None:
    terminal = Terminal(project, "shell", at_work)
    terminal.until("$ ")
    job = project.states(at_work)["first"]["job_id"]
    project.cluster.run("alice", "scancel", "-s", "USR2", job)
    time.sleep(1)
    terminal.type("ls /usr; echo here-$((40+2))\n")
    terminal.until("here-42")
    terminal.type("exit\n")
    assert terminal.end() == 0


@pytest.mark.parametrize("how", ["kill hpc", "kill srun", "hang up", "cancel the job"])
def test_nothing_stays_of_a_shell_however_it_ends(project: Project, at_work: str, how: str) -> None:
    terminal = Terminal(project, "shell", at_work)
    terminal.until("$ ")
    terminal.type("sleep 200\n")
    shell = on_node(SHELL, project)
    helper = fuse_helper(shell)
    if how == "kill hpc":
        terminal.process.kill()
    elif how == "kill srun":
        os.kill(first_srun(project), signal.SIGKILL)
    elif how == "hang up":
        terminal.hang_up()
    else:
        project.hpc("cancel", at_work)
        assert terminal.end() == 1
        assert "error: " + at_work + "/first: its job has ended" in terminal.text
    until(lambda: not processes(SHELL, project), "the shell has ended")
    until(lambda: gone(shell, helper), "its container's FUSE helper has ended")
    if how != "cancel the job":
        assert project.states(at_work)["first"]["state"] == "RUNNING"


def test_ctrl_c_ends_a_single_program(project: Project, at_work: str) -> None:
    terminal = Terminal(project, "shell", at_work, "--", "sh", "-c", "echo up; exec sleep 200")
    terminal.until("up")
    terminal.type("\x03")
    assert terminal.end() == 130
    until(lambda: not processes(SHELL, project), "the program has ended")


def test_staged_image_is_the_shells_too(project: Project) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="hpc-test-scratch-", dir="/tmp"))
    scratch.chmod(0o1777)
    try:
        site = (project.folder / "sites" / "slurm-test.toml").read_text()
        project.write("sites/slurm-test.toml", site + f'scratch = "{scratch}"\n')
        run = submit(project, "first", "--set", "first.seconds=300")
        project.until(lambda f: f["first"]["state"] == "RUNNING" and f["first"]["phase"] == "running", run)
        used = project.hpc("shell", run, "--", "sh", "-c", "echo $APPTAINER_CONTAINER").stdout.strip()
        assert used == str(next(scratch.glob("hpc-*/images/*.sif")))
        project.hpc("cancel", run)
        project.until(ended("first"), run)
    finally:
        shutil.rmtree(scratch)


def test_stage_that_waits_or_has_ended_has_no_shell(project: Project) -> None:
    run = submit(project, "second", "--set", "first.seconds=300")
    project.until(lambda f: f["first"]["state"] == "RUNNING", run)
    done = project.hpc("shell", f"{run}/second", "--", "true", check=False)
    assert done.returncode == 7
    assert done.stderr.startswith(f"error: {run}/second is PENDING")
    project.hpc("cancel", run)
    project.until(ended("first", "second"), run)
    done = project.hpc("shell", run, "--", "true", check=False)
    assert (done.returncode, f"no stage of {run} is running" in done.stderr) == (7, True)


# ---- top


@pytest.fixture
def stub(project: Project) -> dict[str, str]:
    """A PATH on which nvidia-smi is a named stub: there is no GPU."""
    folder = project.write("bin/nvidia-smi", (STUBS / "nvidia-smi").read_text()).parent
    (folder / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin"}


def test_top_shows_the_jobs_own_gpus(project: Project, at_work: str, stub: dict[str, str]) -> None:
    done = project.hpc("top", "--json", env=stub)
    found = json.loads(done.stdout)
    assert (found["schema"], found["problems"]) == ("hpc.top/1", [])
    assert len(found["gpus"]) == 2
    for row in found["gpus"]:
        assert str(row["index"]) == jobs_own(project, row["run"])["CUDA_VISIBLE_DEVICES"]
        assert row["node"] == project.states(row["run"])["first"]["node"]
        assert (row["utilization"], row["power_w"]) == (50.0, 388.52)
    plain = project.hpc("top", at_work, env=stub)
    assert [line.split()[0] for line in plain.stdout.splitlines()] == ["RUN/STAGE", f"{at_work}/first"]
    until(lambda: not processes(GPUS, project), "the samplers have ended")


def test_node_without_nvidia_smi_is_one_sentence(project: Project, at_work: str) -> None:
    done = project.hpc("top", at_work)
    node = project.states(at_work)["first"]["node"]
    job = project.states(at_work)["first"]["job_id"]
    assert (done.stdout, done.stderr) == (
        "",
        f"{at_work}/first (job {job}): {node}: there is no nvidia-smi on this node\n",
    )


@pytest.mark.parametrize("how", ["ctrl-c", "kill hpc", "kill srun", "cancel the job"])
def test_live_table_and_nothing_stays_of_it(project: Project, at_work: str, stub: dict[str, str], how: str) -> None:
    terminal = Terminal(project, "top", at_work, "--interval", "0.5", env=stub)
    terminal.until(f"{at_work}/first")
    terminal.until("50%")
    assert len(processes(GPUS, project)) > 1, "srun's and the node's"
    if how == "ctrl-c":
        terminal.type("\x03")
        assert terminal.end() == 0
    elif how == "kill hpc":
        terminal.process.kill()
    elif how == "kill srun":
        os.kill(first_srun(project), signal.SIGKILL)
        terminal.until("first (job ")
        terminal.type("\x03")
    else:
        project.hpc("cancel", at_work)
        terminal.until("no running stage of yours holds a GPU")
        assert terminal.end() == 0
    until(lambda: not processes(GPUS, project), "the samplers have ended")


def test_gpus_that_idle_are_told_of(project: Project, at_work: str, stub: dict[str, str]) -> None:
    terminal = Terminal(project, "top", at_work, env={**stub, "STUB_GPU_USE": "0"})
    terminal.until("0%")
    project.cluster.run("alice", "scancel", "-s", "USR2", project.states(at_work)["first"]["job_id"])  # as Slurm warns
    terminal.until("holds 1 GPU, uses none (the last ", timeout=120)
    assert float(terminal.until(" s)")) >= 30
    terminal.type("\x03")
    assert terminal.end() == 0


def test_old_srun_is_explained(project: Project, at_work: str) -> None:
    path = project.write("old/srun", "#!/bin/sh\necho \"srun: unrecognized option '--overlap'\" >&2\nexit 255\n")
    path.chmod(0o755)
    env = {"PATH": f"{path.parent}:/usr/local/bin:/usr/bin:/bin"}
    done = project.hpc("shell", at_work, "--", "true", check=False, env=env)
    assert (done.returncode, "older than 20.11" in done.stderr) == (4, True)
    assert "older than 20.11" in project.hpc("top", at_work, env=env).stderr
    shutil.rmtree(path.parent)
