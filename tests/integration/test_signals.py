"""The scheduler's signals on a real cluster, as an ordinary user, whose image is mounted by a FUSE helper.

The payload's handler imports modules that were not yet loaded: it needs the image while Slurm signals all processes.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc.core import rundir
from hpc.node.shield import HELPERS

from .project import Project
from .test_states import ended, submit

STAGE = '''"""A stage for tests: it saves in its signal handler."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from hpc.core.stage import Artifact, Context, Resources, Stage


@dataclass(frozen=True, kw_only=True)
class Config:
    seconds: float = 100.0
    deaf: bool = False


def run(config: Config, ctx: Context) -> None:
    saved = ctx.checkpoints / "saved"
    heard = os.open(ctx.checkpoints / "heard", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def handler(number, frame):
        os.write(heard, (signal.Signals(number).name + "\\n").encode())
        earlier[number](number, frame)
        if not saved.exists():
            import tarfile, wave, xmlrpc.client
            saved.write_text(" ".join(m.__name__ for m in (tarfile, wave, xmlrpc.client)))

    earlier = {n: signal.signal(n, handler) for n in (signal.SIGUSR2, signal.SIGTERM)}
    end = time.monotonic() + (0 if saved.exists() else config.seconds)
    ctx.progress(0, 1, "listening")
    while time.monotonic() < end and (config.deaf or not saved.exists()):
        time.sleep(0.05)
    if ctx.stopping():
        time.sleep(1)  # a copy that comes late is still counted
        return
    for path in ctx.outputs.values():
        path.write_text("whole")


STAGE = Stage(
    name="listener",
    summary="A stage for tests",
    config=Config,
    container="train",
    consumes={},
    outputs=lambda config: {"dataset": Artifact(kind="dataset", path="result.json")},
    resources=lambda config: Resources(cpus_per_task=1, mem_gb=1, time_min=5),
    run=run,
)
'''


@dataclass(frozen=True)
class Processes:
    """One running stage on its node."""

    entry: int
    apptainer: int
    payload: int
    helpers: frozenset[int]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def name(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None


def processes(folder: Path) -> Processes:
    """Those of the stage that works in the folder."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if "hpc.inside.runner" in words and str(folder / "config.json") in words and words[0].endswith("python3"):
            payload = int(entry.name)
            apptainer = parent(payload)
            helpers = frozenset(pid for pid in children(apptainer) if name(pid) in HELPERS)
            return Processes(parent(apptainer), apptainer, payload, helpers)
    raise AssertionError("the stage does not run")


@dataclass(frozen=True)
class Listener:
    """The stage, submitted."""

    project: Project
    run: str

    @property
    def folder(self) -> Path:
        return self.project.folder / "runs" / self.run / "listener"

    @property
    def job_id(self) -> str:
        return str(self.project.states(self.run)["listener"]["job_id"])

    def listening(self, message: str = "listening") -> Processes:
        self.project.until(lambda f: f["listener"]["message"] == message, self.run)
        found = processes(self.folder)
        assert found.helpers, "the image is not mounted by a helper: this test would test nothing"
        return found

    def heard(self) -> list[str]:
        """The signals as the stage's own handler was told them."""
        return (self.folder / "checkpoints" / "heard").read_text().split()

    def requests(self) -> list[str]:
        """The signals as the stage's context told them."""
        path = self.folder / "attempt-1" / "events.jsonl"
        return [e["signal"] for e in rundir.last_events(path) if e["phase"] == "stopping"]

    def saved(self) -> str:
        path = self.folder / "checkpoints" / "saved"
        return path.read_text() if path.exists() else ""

    def told(self) -> str:
        """All that the attempt left, for a failure's message."""
        files = ("events.jsonl", "stderr", "outcome.json")
        return "\n".join((self.folder / "attempt-1" / name).read_text() for name in files) + str(self.heard())

    def end(self, timeout: float = 120) -> dict[str, object]:
        return self.project.until(ended("listener"), self.run, timeout)["listener"]


@pytest.fixture
def listener(project: Project, hpc_install: Path) -> Listener:
    """Not started yet."""
    (folder,) = hpc_install.glob("lib/python*/site-packages/stages")
    (folder / "listener.py").write_text(STAGE)
    return Listener(project, "")


def start(listener: Listener, *options: str) -> Listener:
    return Listener(listener.project, submit(listener.project, "listener", *options))


def gone(pids: frozenset[int]) -> bool:
    deadline = time.monotonic() + 60
    while any(name(pid) in HELPERS for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    "words",
    [("-s", "USR2"), ("-s", "USR2", "-f"), ("-s", "TERM"), ()],
    ids=["scancel -s USR2", "scancel -s USR2 -f", "scancel -s TERM", "scancel"],
)
def test_signal_by_scancel_is_heard_and_the_work_is_saved(listener: Listener, words: tuple[str, ...]) -> None:
    stage = start(listener)
    running = stage.listening()
    listener.project.cluster.run("alice", "scancel", *words, stage.job_id)
    end = stage.end()
    wanted = "SIGUSR2" if "USR2" in words else "SIGTERM"
    assert stage.saved() == "tarfile wave xmlrpc.client", stage.told()
    assert (stage.heard(), stage.requests()) == ([wanted], [wanted]), stage.told()
    assert end["resumable"], (end, stage.told())
    assert gone(running.helpers)


def test_time_limit_is_heard_and_the_next_submission_goes_on(listener: Listener) -> None:
    stage = start(listener, "--time", "1")
    running = stage.listening()
    end = stage.end(timeout=240)
    assert (end["state"], end["resumable"]) == ("TIMEOUT", True)
    assert stage.saved()
    assert (stage.heard(), stage.requests()) == (["SIGUSR2"], ["SIGUSR2"]), stage.told()
    assert gone(running.helpers)
    again = start(listener, "--time", "1")
    assert again.end()["state"] == "COMPLETED"


def test_a_job_that_saved_at_the_time_limit_is_queued_again_by_itself(listener: Listener) -> None:
    site = listener.project.folder / "sites" / "slurm-test.toml"
    site.write_text(site.read_text() + "requeue = 1\n")
    stage = start(listener, "--time", "1")
    stage.listening()
    listener.project.cluster.run("alice", "scancel", "-s", "USR2", stage.job_id)  # the warning, a little early
    end = stage.end(timeout=180)
    assert (end["state"], end["attempt"]) == ("COMPLETED", 1), (end, stage.told())
    earlier = rundir.read_json(stage.folder / "attempt-1" / "outcome-0.json") or {}
    assert (earlier["state"], earlier["resumable"]) == ("TIMEOUT", True)


def on_dgx04(listener: Listener) -> None:
    site = listener.project.folder / "sites" / "slurm-test.toml"
    site.write_text(site.read_text() + '[sbatch]\nnodelist = "dgx04"\ngres = "gpu:a100:8"\n')


def test_preemption_is_heard(listener: Listener) -> None:
    """For the GPUs of a node: whatever else runs on it, for a test beside this one, is in nobody's way."""
    on_dgx04(listener)
    stage = start(listener, "--partition", "scavenge")
    running = stage.listening()
    cluster = listener.project.cluster
    other = cluster.run(
        "alice", "sbatch", "--parsable", "-p", "batch", "-A", "research", "-w", "dgx04", "--gres=gpu:8", "-t", "1",
        "-o", "/dev/null", "--wrap", "sleep 3",
    ).stdout.strip()  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not stage.saved():
            assert time.monotonic() < deadline, "never asked to end"
            time.sleep(0.2)
        end = stage.end()
    finally:
        cluster.run("alice", "scancel", other, check=False)
    assert (stage.heard(), stage.requests()) == (["SIGTERM"], ["SIGTERM"]), stage.told()
    assert end["resumable"], (end, stage.told())
    assert gone(running.helpers)


def test_requeue_is_heard_and_leaves_no_helper(listener: Listener) -> None:
    stage = start(listener)
    running = stage.listening()
    listener.project.cluster.run("alice", "scontrol", "requeue", stage.job_id)
    assert gone(running.helpers)
    assert stage.saved()
    assert (stage.heard(), stage.requests()) == (["SIGTERM"], ["SIGTERM"]), stage.told()
    listener.project.cluster.run("alice", "scancel", stage.job_id)  # it waits two minutes before it starts again
    stage.end()


@pytest.mark.parametrize("victim", ["all", "apptainer", "entry", "payload"])
def test_no_helper_is_left_after_a_kill(listener: Listener, victim: str) -> None:
    stage = start(listener)
    running = stage.listening()
    if victim == "all":
        listener.project.cluster.run("alice", "scancel", "-s", "KILL", stage.job_id)
    else:
        os.kill(getattr(running, victim), signal.SIGKILL)
    assert gone(running.helpers)
    end = stage.end()
    assert end["state"] in {"CANCELLED", "FAILED", "LOST"}
