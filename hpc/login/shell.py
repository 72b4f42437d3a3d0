"""`hpc shell`: one more step in a stage's job, with its own container; on this machine simply one more process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from hpc.core import rundir
from hpc.core.errors import HpcError, NotFound, UsageError
from hpc.core.rundir import RunDir
from hpc.login import slurm
from hpc.login.states import Scheduler, StageState

_OURS = (b"srun: ", b"slurmstepd")
"""How the lines begin that are Slurm's and not the program's."""
_RAN = re.compile(r"task 0: [A-Z]")
"""srun's word on how the program ended."""
_END_S = 15


def choose(run: RunDir, stage: str | None, rows: Sequence[StageState]) -> StageState:
    """The stage that runs. NotFound where none does, UsageError where several do and none is named."""
    asked = [s for s in rows if stage is None or s.stage == stage]
    running = [s for s in asked if s.state == "RUNNING"]
    if len(running) > 1:
        names = ", ".join(s.stage for s in running)
        hint = f"name one: hpc shell {run.id}/{running[0].stage}"
        raise UsageError(f"{run.id} has several stages at work: {names}", hint=hint)
    if not running:
        what = f"{run.id}/{stage} is {asked[0].state}" if stage else f"no stage of {run.id} is running"
        raise NotFound(f"{what}: there is no container to enter", hint=f"`hpc status {run.id}` shows where it stands")
    return running[0]


def enter(run: RunDir, state: StageState, program: Sequence[str], node: str | None) -> int:
    """Run the program, or a shell, beside the stage; its exit code. HpcError where it cannot be started."""
    what, folder = f"{run.id}/{state.stage}", run.stage(state.stage)
    if not folder.attempt(state.attempt).launch.exists():
        raise HpcError(f"{what} has not started its container yet", hint="try again in a moment; `hpc status` shows it")
    python = (rundir.read_json(folder.job) or {}).get("python") or sys.executable
    argv = [python, "-m", "hpc.node.shell", str(folder.path), str(state.attempt), *program]
    env = {**slurm.step_env(os.environ), "PYTHONPATH": str(run.code)}
    if not program:
        print(f"==> {what} on {node or state.node}: `exit` leaves, the stage goes on <==", file=sys.stderr)
    if state.scheduler == "local":
        if state.node != os.uname().nodename:
            raise HpcError(f"{what} runs on {state.node}, not here", hint=f"ssh {state.node}, then the same again")
        if node not in (None, state.node):
            raise UsageError(f"{what} runs on this machine, not on {node}", hint="leave --node out")
        os.execve(python, argv, env)
    pty = not program and sys.stdin.isatty() and sys.stdout.isatty()
    code = _step(what, slurm.step(state.job_id, argv, node=node, pty=pty), env)
    if code > 128 and _has_ended(state.job_id):  # on a terminal srun only says that it was killed
        raise slurm.step_failure(what, "Job step aborted")
    return code


def _has_ended(job_id: str) -> bool:
    scheduler = Scheduler()
    job = scheduler.queue().get(job_id)
    return scheduler.problem is None and (job is None or job.state != "RUNNING")


def _step(what: str, argv: Sequence[str], env: dict[str, str]) -> int:
    try:
        process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, preexec_fn=_end_with_us)
    except FileNotFoundError:
        raise slurm.missing(argv[0]) from None
    assert process.stderr is not None
    words: list[str] = []
    with process.stderr:
        relay = threading.Thread(target=_relay, args=(process.stderr, words), daemon=True)
        relay.start()
        try:
            code = _wait(process)
        finally:
            relay.join(_END_S)
    text = "\n".join(words)
    ran = _RAN.search(text) and not re.search(r"CANCELLED AT|execve\(\)", text)
    if code in (0, 130) or ran or not words:
        return code if code >= 0 else 128 - code
    raise slurm.step_failure(what, text)


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal sent it to srun too
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.terminate()
        raise


def _relay(source: IO[bytes], words: list[str]) -> None:
    """The program's stderr as it comes; Slurm's own lines are kept back in `words`."""
    out, held, inside = sys.stderr.buffer, b"", False
    while data := os.read(source.fileno(), 65536):
        for part in data.splitlines(keepends=True):
            held += part
            if inside or not _may_be_slurms(held):
                out.write(held)
                inside = not held.endswith(b"\n")
                held = b""
            elif held.endswith(b"\n"):
                words.append(held.decode("utf-8", "replace").rstrip())
                held = b""
        out.flush()
    out.write(held)
    out.flush()


def _may_be_slurms(line: bytes) -> bool:
    return any(line.startswith(begin) or begin.startswith(line) for begin in _OURS)


def _end_with_us() -> None:
    """In the child, before exec: SIGTERM when this process is gone, so that no step stays in the job."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
