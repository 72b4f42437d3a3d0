"""submitit, wrapped: one Placed stage -> a batch script, or a job on Slurm or on this machine. See docs/adr/0005."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hpc.core import rundir
from hpc.core.errors import RuntimeUnavailable
from hpc.login import slurm
from hpc.login.place import Placed
from hpc.node.enter import enter, process_start

_NEVER_MIN = 60 * 24 * 365
"""submitit's own local time limit would count the waiting for inputs: the node enforces the stage's."""


PICKLE = "job.pkl"
"""The job's own copy of what submitit pickles. submitit gives its copy the job's name only after sbatch has answered:
where that answer is lost, or `hpc` is killed, the job would wait for it in vain."""


def script(placed: Placed, dependency: str | None) -> str:
    """The batch script, byte for byte as `submit_slurm` gives it to sbatch."""
    executor = _slurm_executor(placed, dependency)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


class AnswerLost(RuntimeUnavailable):
    """Neither sbatch nor squeue tells whether the job is queued."""


def submit_slurm(placed: Placed, dependency: str | None, user: str) -> str:
    """Queue the stage; the job's id. RuntimeUnavailable with Slurm's words where sbatch refuses."""
    from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

    executor = _slurm_executor(placed, dependency)
    _make_folder(placed)
    DelayedSubmission(enter, placed.job).dump(placed.scheduler_dir / PICKLE)
    try:
        with _environment(slurm.program_env(os.environ)), contextlib.redirect_stderr(io.StringIO()):
            return str(executor.submit(enter, placed.job).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        refused = slurm.failure("sbatch", _sbatch_words(str(error)))
        if "cannot be reached" in refused.message:  # the answer was lost, the job perhaps not
            try:
                queued = slurm.find(user, placed.comment)
            except RuntimeUnavailable:
                hint = "in a minute the same `hpc submit` completes it, and queues nothing twice"
                raise AnswerLost(refused.message, hint=hint) from error
            if queued is not None:
                return queued.job_id
        raise refused from error


def submit_local(placed: Placed) -> int:
    """Start the stage on this machine, in a session of its own; the process id of its controller.

    Who it is, is written down by the starting process itself: it goes on where `hpc` is killed in between.
    """
    from submitit.local.local import LocalExecutor

    _make_folder(placed)

    def start() -> int:
        os.environ["PYTHONPATH"] = str(placed.code)
        os.environ.pop("PYTHONHOME", None)
        executor = LocalExecutor(folder=placed.scheduler_dir, python=shlex.quote(placed.python))
        executor.update_parameters(timeout_min=_NEVER_MIN, gpus_per_node=placed.planned.resources.gpus_per_node)
        pid = int(executor.submit(enter, placed.job).job_id)
        who = {"pid": pid, "start": process_start(pid), "group": os.getpid(), "host": os.uname().nodename}
        who["heartbeat_s"] = placed.job.heartbeat_s
        rundir.write_json(placed.stage_dir.attempt(placed.attempt).process, who)
        return pid

    return _in_new_session(start)


def stop_local(process: Mapping[str, Any], number: int = signal.SIGTERM) -> None:
    """Signal a local job's controller (SIGTERM), or end its whole process group (SIGKILL)."""
    with contextlib.suppress(ProcessLookupError, KeyError):  # KeyError: it was never started
        if number == signal.SIGKILL:
            os.killpg(process["group"], signal.SIGKILL)
        elif process_start(process["pid"]) == process["start"]:
            os.kill(process["pid"], number)


def _make_folder(placed: Placed) -> None:
    """Open to its owner alone: what is pickled holds the site's `env`, secrets and all."""
    placed.scheduler_dir.mkdir(mode=0o700, parents=True, exist_ok=True)


def _slurm_executor(placed: Placed, dependency: str | None) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no Slurm on this machine

    executor = Executor(folder=placed.scheduler_dir, python=shlex.quote(placed.python))
    executor._throttling = 0  # it would wait 0.2 s before each submission
    named = shlex.quote(str(placed.scheduler_dir)) + "/${SLURM_JOB_ID}_submitted.pkl"
    setup = [*placed.batch["setup"], f"ln -s {PICKLE} {named} 2>/dev/null || true"]
    parameters = {**placed.batch, "setup": setup, **({"dependency": dependency} if dependency else {})}
    executor.update_parameters(**parameters)
    return executor


def _sbatch_words(text: str) -> str:
    """sbatch's own lines out of submitit's error."""
    lines = [line for line in text.splitlines() if line.startswith("sbatch:")]
    return "\n".join(dict.fromkeys(lines)) or text


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """submitit hands our environment to sbatch: for this moment it is the clean one."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _in_new_session(start: Callable[[], int]) -> int:
    """The result of `start`, run in a child with its own session and group: Ctrl-C and logout don't reach it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.write(writer, str(start()).encode())
            status = 0
        except BaseException as error:
            os.write(writer, f"!{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text.isdigit():
        raise RuntimeUnavailable(
            f"the job could not be started on this machine: {text.lstrip('!') or 'no answer'}",
            hint="is the run folder writable, and is there memory?",
        )
    return int(text)


def preload() -> None:
    """Import submitit now, so that its cost is not counted as submission."""
    import submitit.local.local
    import submitit.slurm.slurm  # noqa: F401
