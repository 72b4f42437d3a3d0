"""The job's entry on the compute node: wait for inputs, start one container, pass signals on, record the outcome."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpc.core import endpoint, rundir
from hpc.core.errors import HpcError
from hpc.node import again, memory, outcome, peers, private, succession, unchanged
from hpc.node.deaf import deaf_thread
from hpc.node.inplace import InPlace, check
from hpc.node.launch import Launch, process_env, without_secrets
from hpc.node.shield import shielded
from hpc.node.staging import Staging, in_words, staged

_POLL_S = 0.2
_RESERVE = 1 << 16
"""Bytes kept for the outcome."""
_GRACE_S = 10
"""Between SIGTERM and SIGKILL at the time limit."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that crosses from the login node to the compute node; pickled by submitit, read by the same Python."""

    stage_dir: str
    attempt: int
    key: str
    launch: Launch
    staging: Staging | None = None
    """The image to copy to the node first, which `launch` then starts."""
    image: InPlace | None = None
    """The image that `launch` starts from where it lies."""
    mem_gb: int
    heartbeat_s: int
    waits: tuple[tuple[str, str], ...] = ()
    """(stage folder, key) that must be done first; on Slurm the scheduler waits, so it is empty."""
    limit_s: int
    """The time limit, seconds from the payload's start."""
    enforce: bool = False
    """True where no scheduler enforces the limit, so that this process must."""
    signal_delay_s: int = 90
    requeue: int = 0
    """How often it is queued again where it has saved its work at the time limit."""
    listen: str = ""
    """The address of the sockets that are opened for the payload, which has an empty network."""
    ports: tuple[str, ...] = ()
    """Their names."""
    tasks: int = 1
    """It is entered by each of so many."""
    takes_over: bool = False
    """It is a service's next job, and starts while the one before it serves."""


def enter(job: Job) -> None:
    """Run the job to its end. Leaves with the payload's exit code, so that the scheduler sees the same end."""
    if job.enforce:
        _end_with_controller()
    stage_dir = rundir.StageDir(Path(job.stage_dir))
    task = rundir.task_number(job.tasks)
    attempt = stage_dir.attempt(job.attempt).of_task(task)
    attempt.path.mkdir(exist_ok=True)
    _keep_earlier_outcome(attempt)
    refused = succession.refused(stage_dir, job.attempt)
    if not (job.takes_over or refused or task):
        endpoint.clear(stage_dir, keep_token=attempt.launch.exists())  # a start of this very job has been here
    watch = _Watch(job, attempt)
    watch.listen()
    watch.reserve()
    try:
        rundir.append_event(attempt.events, "starting", host=socket.gethostname(), job_id=_job_id())
        result = refused or _run(job, attempt, watch)
    except HpcError as error:
        result = outcome.refused(error)
    except OSError as error:
        result = outcome.could_not_start(job.launch.argv[0], error)
    watch.over = True
    followed = bool(stage_dir.successors())
    keep = _may_return(result) or followed
    if not task:
        endpoint.clear(stage_dir, os.environ.get("SLURM_JOB_ID", ""), keep_token=keep)
    watch.record(result)
    if not task and result.state == "TIMEOUT":  # a preempted job may come back by itself
        endpoint.promote(stage_dir, job.attempt)
    with contextlib.suppress(OSError):  # the outcome is what counts
        rundir.append_event(attempt.events, "done" if result.state == "COMPLETED" else "failed", state=result.state)
    if not (task or followed) and again.wanted(result, job.requeue) and (why := again.requeue()):
        with contextlib.suppress(OSError), open(attempt.stderr, "a") as stderr:
            stderr.write(f"warning: the job could not be queued again: {why}\n")
    if result.state != "COMPLETED":
        sys.exit(result.exit_code or 1)


class _Watch:
    """The signals that came, the payload that gets them, and the outcome that is written."""

    def __init__(self, job: Job, attempt: rundir.AttemptDir) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self.signals: list[int] = []
        self.over = False
        """The end is known: a signal that comes now changes nothing."""
        self.started = time.time()
        self._job = job
        self._attempt = attempt

    def listen(self) -> None:
        """Take over the signals; submitit's own handlers would requeue or swallow them."""
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            signal.signal(number, self._received)

    def send(self, number: int) -> None:
        """Note a signal, and pass it on to the payload once."""
        self.signals.append(number)
        if self.child is not None and self.child.returncode is None:
            self.child.send_signal(number)

    def asked(self) -> outcome.Outcome | None:
        """What the signals so far mean."""
        elapsed = time.time() - self.started
        return outcome.asked_to_end(tuple(self.signals), elapsed, self._job.limit_s, self._job.signal_delay_s)

    def reserve(self) -> None:
        """Keep some room for the outcome: a stage that fills the disk must not take the record of that with it."""
        with contextlib.suppress(OSError):
            self._attempt.reserve.write_bytes(bytes(_RESERVE))

    def record(self, result: outcome.Outcome) -> None:
        self._attempt.reserve.unlink(missing_ok=True)
        document = {
            "schema": "hpc.outcome/1",
            **asdict(result),
            "host": socket.gethostname(),
            "job_id": _job_id(),
            "started": self.started,
            "ended": time.time(),
        }
        rundir.write_json(self._attempt.outcome, document, durable=True)

    def _received(self, number: int, frame: object) -> None:
        if number == signal.SIGCONT or number in self.signals or self.over:
            return
        self.send(signal.SIGTERM if number == signal.SIGINT else number)
        if self._attempt.stop.exists():  # at once: a service that ends slowly is killed before its end
            endpoint.clear(rundir.StageDir(Path(self._job.stage_dir)), os.environ.get("SLURM_JOB_ID", ""))
        asked = self.asked()
        if signal.SIGTERM in self.signals and asked is not None:
            # SIGKILL follows in seconds, and then nobody could write this; a better end overwrites it
            cancelled = self._attempt.stop.exists()
            by_us = replace(asked, state="CANCELLED", cause="cancelled by hpc cancel") if cancelled else asked
            self.record(peers.failed(self._attempt, self._job.tasks, self.started) or by_us)


def _run(job: Job, attempt: rundir.AttemptDir, watch: _Watch) -> outcome.Outcome:
    with _heartbeat(attempt.heartbeat, job.heartbeat_s) if job.waits else contextlib.nullcontext():
        blocked = _wait_for_inputs(job, watch)
    if blocked is not None:
        return blocked
    if job.image is not None:
        why = "the image's file was touched since it was planned with"
        check(job.image, lambda: rundir.append_event(attempt.events, "checking", message=why))
    unchanged.check(
        rundir.StageDir(Path(job.stage_dir)), lambda text: rundir.append_event(attempt.events, "checking", message=text)
    )
    if job.staging is None:
        return _run_container(job, attempt, watch)

    def tell(done: int, total: int, rate: float) -> None:
        message = in_words("the image", total, rate)
        rundir.append_event(attempt.events, "staging", done=done, total=total, message=message)

    with staged(job.staging, tell):
        rundir.append_event(attempt.events, "starting", message="the image is on this node")
        return _run_container(job, attempt, watch)


def _run_container(job: Job, attempt: rundir.AttemptDir, watch: _Watch) -> outcome.Outcome:
    with private.sockets_for(job.listen, job.ports) as sockets:
        return _run_payload(job, attempt, watch, sockets)


def _run_payload(job: Job, attempt: rundir.AttemptDir, watch: _Watch, sockets: Mapping[str, int]) -> outcome.Outcome:
    own = replace(job.launch, env={**job.launch.env, **endpoint.handing(sockets)})
    env = process_env(own, {**os.environ, **_hub_token()})
    rundir.write_json(attempt.launch, {"argv": list(job.launch.argv), "env": without_secrets(env)})
    before = memory.kills()
    watch.started = time.time()
    with open(attempt.stdout, "ab") as stdout, open(attempt.stderr, "ab") as stderr:
        watch.child = subprocess.Popen(
            job.launch.argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=env,
            preexec_fn=_die_with_us,
            pass_fds=tuple(sockets.values()),
        )
        for number in watch.signals:  # one that came while it was being started reached nobody
            watch.child.send_signal(number)
        with _shielded(job, attempt, watch.child.pid), _heartbeat(attempt.heartbeat, job.heartbeat_s):
            code = _wait(watch, job) if job.enforce else watch.child.wait()
    end = outcome.classify(
        code=code,
        launch=job.launch,
        attempt=attempt,
        asked=watch.asked(),
        oom_kills=memory.kills() - before,
        mem_gb=job.mem_gb,
        disk_full=_disk_full(attempt.path),
    )
    return peers.first(end, attempt, job.tasks, watch.started)


def _shielded(job: Job, attempt: rundir.AttemptDir, pid: int) -> contextlib.AbstractContextManager[None]:
    if job.launch.kind == "venv":  # no image, no helper
        return contextlib.nullcontext()

    def refused(why: str) -> None:
        text = f"the image's FUSE helper could not be shielded ({why}): a signal may end the stage before it has saved"
        with contextlib.suppress(OSError), open(attempt.stderr, "a") as stderr:
            stderr.write(f"warning: {text}\n")

    return shielded(pid, refused)


def _wait(watch: _Watch, job: Job) -> int:
    """The payload's return code; warns and ends it at the limit, as Slurm would."""
    assert watch.child is not None
    while True:
        try:
            return watch.child.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            spent = time.time() - watch.started
            if spent > job.limit_s + _GRACE_S:
                watch.child.kill()
            elif spent > job.limit_s and signal.SIGTERM not in watch.signals:
                watch.send(signal.SIGTERM)
            elif spent > job.limit_s - job.signal_delay_s and signal.SIGUSR2 not in watch.signals:
                watch.send(signal.SIGUSR2)


def _wait_for_inputs(job: Job, watch: _Watch) -> outcome.Outcome | None:
    """None once every input is there; else why it will never be."""
    for folder, key in job.waits:
        source = rundir.StageDir(Path(folder))
        while not source.done(key):
            if signal.SIGTERM in watch.signals:
                return outcome.cancelled()
            failed = _has_failed(source)
            if failed:
                return outcome.blocked(source.name, failed)
            time.sleep(_POLL_S)
    return None


def _has_failed(source: rundir.StageDir) -> str | None:
    """The state of an input's latest attempt where it ended without a result, else None."""
    latest = rundir.read_json(source.job)
    if latest is None or "attempt" not in latest:
        return "NEVER SUBMITTED"
    attempt = source.attempt(latest["attempt"])
    ended = outcome.read(attempt)
    if ended is not None:
        return None if ended["state"] == "COMPLETED" else str(ended["state"])
    if attempt.stop.exists():
        return "CANCELLED"
    started = rundir.read_json(attempt.process)
    return "LOST" if started and gone(attempt, started) else None


def alive(pid: int, start: str) -> bool:
    """True while the process with this number AND this start time runs: numbers are given again."""
    return process_start(pid) == start


def elsewhere(process: Mapping[str, Any]) -> str:
    """The machine that a local job was started on, where that is another one than this."""
    host = str(process.get("host", ""))
    return "" if host in ("", os.uname().nodename) or alive(process["pid"], process["start"]) else host


def gone(attempt: rundir.AttemptDir, process: Mapping[str, Any]) -> bool:
    """Whether a local job's controller is no more; on another machine, where it has ended or long written nothing."""
    if not elsewhere(process):
        return not alive(process["pid"], process["start"])
    signs = [path.stat().st_mtime for path in (attempt.process, attempt.events, attempt.heartbeat) if path.exists()]
    return attempt.outcome.exists() or time.time() - max(signs, default=0) > 3 * process["heartbeat_s"] + 60


def process_start(pid: int) -> str | None:
    """The process's start in clock ticks since boot, from /proc/PID/stat; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


@contextlib.contextmanager
def _heartbeat(path: Path, every_s: int) -> Iterator[None]:
    """Touch the file now and then while the payload runs, so that a dead node can be told from a slow one."""
    ended = threading.Event()

    def beat() -> None:
        while True:
            try:
                path.touch()
            except OSError:  # a full disk must not end the job
                pass
            if ended.wait(every_s):
                return

    thread = deaf_thread(beat)
    try:
        yield
    finally:
        ended.set()
        thread.join(1)


def _keep_earlier_outcome(attempt: rundir.AttemptDir) -> None:
    """A job that Slurm requeued starts here again: the earlier end stays readable under its own name."""
    if attempt.outcome.exists():
        number = len(list(attempt.path.glob("outcome-*.json")))
        attempt.outcome.rename(attempt.path / f"outcome-{number}.json")
    attempt.error.unlink(missing_ok=True)
    attempt.remark.unlink(missing_ok=True)


def _may_return(result: outcome.Outcome) -> bool:
    """Whether Slurm may start this very job again: preempted, requeued, or cancelled, but not by `hpc cancel`."""
    ended = result.state in {"PREEMPTED", "CANCELLED"} and result.resumable
    return ended and os.environ.get("SLURM_JOB_ID") == _job_id()


def _disk_full(path: Path) -> bool:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize < _RESERVE


def _end_with_controller() -> None:
    """A local job is known by its controller: what outlived it would go on unseen, beside what is submitted next."""
    _die_with_us()
    if os.getppid() != int(os.environ.get("SUBMITIT_LOCAL_JOB_ID", os.getppid())):  # it is gone already
        os.kill(os.getpid(), signal.SIGKILL)


def _die_with_us() -> None:
    """In the child: end when the process that started it ends, even by SIGKILL (Linux, prctl PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _hub_token() -> dict[str, str]:
    """HF_TOKEN from the token file that huggingface_hub writes: the container does not see the home folder."""
    if "HF_TOKEN" in os.environ:
        return {}
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    try:
        token = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").read_text().strip()
    except OSError:
        return {}
    return {"HF_TOKEN": token} if token else {}


def _job_id() -> str:
    """The job's own id; a local one may run inside an allocation."""
    return os.environ.get("SUBMITIT_LOCAL_JOB_ID") or os.environ.get("SLURM_JOB_ID") or str(os.getpid())
