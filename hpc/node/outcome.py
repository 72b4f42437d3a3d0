"""PURE but for reading the logs: how a job ended, in Slurm's words, with its cause and what to do."""

from __future__ import annotations

import errno
import os
import re
import signal
from dataclasses import dataclass, field, replace
from typing import Any

from hpc.core import rundir
from hpc.core.errors import STOPPED, HpcError
from hpc.node.launch import Launch

_LOG_LINES = 15
_CONTAINER_FAILED = 255


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one attempt."""

    state: str
    """COMPLETED, FAILED, CANCELLED, TIMEOUT, PREEMPTED or OUT_OF_MEMORY."""
    exit_code: int | None = None
    signal: str | None = None
    cause: str = ""
    hint: str = ""
    resumable: bool = False
    """Submitting again goes on from what was saved."""
    log_tail: list[str] = field(default_factory=list)


def read(attempt: rundir.AttemptDir) -> dict[str, Any] | None:
    """How the attempt ended; None where that is not written, or not whole."""
    ended = rundir.read_json(attempt.outcome)
    return ended if ended is not None and isinstance(ended.get("state"), str) else None


def classify(
    *,
    code: int,
    launch: Launch,
    attempt: rundir.AttemptDir,
    asked: Outcome | None,
    oom_kills: int,
    mem_gb: int,
    disk_full: bool = False,
) -> Outcome:
    """The outcome of a payload that returned `code` (negative: ended by that signal).

    `asked` is what the scheduler's signals meant, where any came.
    """
    if code == 0:
        remark = (rundir.read_json(attempt.remark) or {}).get("remark", "")
        return Outcome(state="COMPLETED", exit_code=0, cause=remark)
    lines = rundir.tail(attempt.stderr)
    killed = signal.Signals(-code).name if code < 0 else None
    end = Outcome(
        state="FAILED",
        exit_code=128 - code if code < 0 else code,
        signal=killed,
        log_tail=lines[-_LOG_LINES:],
    )
    said = rundir.read_json(attempt.error)
    if oom_kills > 0 and (killed == "SIGKILL" or said is None or _says_oom(lines)):
        return replace(
            end,
            state="OUT_OF_MEMORY",
            cause=f"it needed more host memory than the {mem_gb} GiB that were asked for",
            hint=f"ask for more: resources = {{ mem_gb = {2 * mem_gb} }}",
        )
    if attempt.stop.exists():
        return replace(end, state="CANCELLED", cause="cancelled by hpc cancel")
    if asked is not None and said is None:
        saved = ", and its work was saved" if code == STOPPED else ""
        return replace(end, state=asked.state, cause=asked.cause + saved, hint=asked.hint, resumable=asked.resumable)
    if disk_full:
        return replace(end, cause=_FULL, hint="make room, then submit again: what is done stays done")
    if said is not None:
        return replace(end, cause=said["cause"], hint=said["hint"] or _hint(lines))
    if launch.kind == "sif" and code == _CONTAINER_FAILED and (fatal := _fatal(lines)):
        return replace(
            end,
            cause=f"the container could not be started: {fatal}",
            hint="`hpc doctor` checks Apptainer and the image",
        )
    cause = f"the stage was ended by {killed}" if killed else f"the stage ended with exit code {code}"
    return replace(end, cause=cause, hint=_hint(lines))


def asked_to_end(signals: tuple[int, ...], elapsed_s: float, limit_s: int, delay_s: int) -> Outcome | None:
    """What the scheduler's signals mean: a time limit, a preemption, a cancellation; None where none came.

    USR2 is the warning `delay_s` before the limit, and Slurm may give it up to a minute early.
    """
    warned, terminated = signal.SIGUSR2 in signals, signal.SIGTERM in signals
    hint = "submit again: it goes on from its last checkpoint"
    if (terminated and elapsed_s >= limit_s - 5) or (warned and elapsed_s >= limit_s - delay_s - 65):
        return Outcome(state="TIMEOUT", cause="the time limit was reached", hint=hint, resumable=True)
    if warned:
        return Outcome(state="PREEMPTED", cause="the scheduler asked the job to end", hint=hint, resumable=True)
    if terminated:
        return Outcome(state="CANCELLED", cause="it was cancelled, or preempted", hint=hint, resumable=True)
    return None


def could_not_start(program: str, error: OSError) -> Outcome:
    """The container program or the venv's Python did not start, or the run folder could not be written."""
    if error.errno == errno.ENOSPC:
        return Outcome(
            state="FAILED",
            exit_code=1,
            cause=_FULL,
            hint="make room, then submit again: what is done stays done",
        )
    return Outcome(
        state="FAILED",
        exit_code=1,
        cause=f"{program} could not be started on this node: {os.strerror(error.errno or 0)}",
        hint="is it installed on the compute nodes? `setup` in the site profile may load its module",
    )


def refused(error: HpcError) -> Outcome:
    """The node itself refused to go on: an image that is not what it should be, no room for it."""
    return Outcome(state="FAILED", exit_code=error.exit_code, cause=error.message, hint=error.hint)


def blocked(stage: str, state: str) -> Outcome:
    """An input will never come."""
    return Outcome(
        state="CANCELLED",
        exit_code=1,
        cause=f"its input stage {stage} did not complete ({state})",
        hint=f"mend {stage}, then submit again: what is done stays done",
    )


def cancelled() -> Outcome:
    """Asked to end before it began."""
    return Outcome(state="CANCELLED", exit_code=143, cause="cancelled before it began")


def _says_oom(lines: list[str]) -> bool:
    return any(re.search(r"oom[-_ ]kill|MemoryError|Cannot allocate memory", line) for line in lines)


def _fatal(lines: list[str]) -> str:
    """Apptainer's own last word: only it tells its 255 from the payload's."""
    found = [line for line in lines if "FATAL:" in line]
    return found[-1].partition("FATAL:")[2].strip() if found else ""


_FULL = "no space is left on the disk that holds the run"

_HINTS = (
    (
        r"CUDA out of memory|OutOfMemoryError",
        "the GPU's memory is full: a smaller batch_size, max_length or qlora",
    ),
    (r"No space left on device|Disk quota exceeded", "the disk is full: make room, then submit again"),
    (r"ModuleNotFoundError", "the environment lacks a package: is it the image that the stage names?"),
    (r"CUDA driver version is insufficient|no kernel image is available", "image and GPU driver do not fit"),
    (r"Transport endpoint is not connected", "the image's mount was lost, mostly by a signal to its helper"),
)


def _hint(lines: list[str]) -> str:
    text = "\n".join(lines)
    return next((hint for pattern, hint in _HINTS if re.search(pattern, text)), "`hpc logs` shows the whole log")
