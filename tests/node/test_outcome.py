"""Exit code, signals, memory kills and the log -> one state, one cause, one way out."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import STOPPED
from hpc.core.rundir import AttemptDir
from hpc.node.launch import Launch
from hpc.node.outcome import Outcome, asked_to_end, blocked, cancelled, classify, could_not_start

SIF = Launch(kind="sif", argv=("apptainer",), env={}, passes=())
VENV = Launch(kind="venv", argv=("python3",), env={}, passes=())
TIMEOUT = Outcome(state="TIMEOUT", cause="the time limit was reached", hint="submit again", resumable=True)
PREEMPTED = Outcome(state="PREEMPTED", cause="the scheduler asked the job to end", hint="again", resumable=True)


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    return AttemptDir(tmp_path)


def end(attempt: AttemptDir, code: int, *, log: str = "", said: dict[str, str] | None = None, **values: Any) -> Outcome:
    """The outcome of a payload with this code, log and error.json."""
    attempt.stderr.write_text(log)
    if said is not None:
        attempt.error.write_text(json.dumps({"cause": "c", "hint": "", **said}))
    usual = {"launch": SIF, "attempt": attempt, "asked": None, "oom_kills": 0, "mem_gb": 16}
    return classify(code=code, **{**usual, **values})


def test_code_0_is_completed(attempt: AttemptDir) -> None:
    assert end(attempt, 0, log="a warning") == Outcome(state="COMPLETED", exit_code=0)


def test_a_completed_stage_may_have_a_remark(attempt: AttemptDir) -> None:
    attempt.remark.write_text(json.dumps({"remark": "WORSE than its base"}))
    assert end(attempt, 0).cause == "WORSE than its base"


def test_code_0_is_completed_even_after_a_signal(attempt: AttemptDir) -> None:
    assert end(attempt, 0, asked=TIMEOUT).state == "COMPLETED"


@pytest.mark.parametrize(
    ("code", "exit_code", "name", "cause"),
    [
        (1, 1, None, "the stage ended with exit code 1"),
        (7, 7, None, "the stage ended with exit code 7"),
        (-signal.SIGSEGV, 139, "SIGSEGV", "the stage was ended by SIGSEGV"),
        (-signal.SIGKILL, 137, "SIGKILL", "the stage was ended by SIGKILL"),
    ],
)
def test_code_and_signal_are_told_apart(
    attempt: AttemptDir, code: int, exit_code: int, name: str | None, cause: str
) -> None:
    found = end(attempt, code)
    assert (found.state, found.exit_code, found.signal, found.cause) == ("FAILED", exit_code, name, cause)
    assert found.hint == "`hpc logs` shows the whole log"


def test_error_of_the_stage_is_the_cause(attempt: AttemptDir) -> None:
    found = end(attempt, 2, said={"cause": "no data", "hint": "give some"})
    assert (found.state, found.cause, found.hint) == ("FAILED", "no data", "give some")


def test_error_of_the_stage_counts_more_than_a_signal_that_came_late(attempt: AttemptDir) -> None:
    assert end(attempt, 1, said={"cause": "no data"}, asked=TIMEOUT).state == "FAILED"


@pytest.mark.parametrize("asked", [TIMEOUT, PREEMPTED])
def test_end_that_was_asked_for_has_its_cause(attempt: AttemptDir, asked: Outcome) -> None:
    found = end(attempt, -signal.SIGKILL, asked=asked)
    assert (found.state, found.cause, found.resumable) == (asked.state, asked.cause, True)


def test_stopped_stage_says_that_its_work_was_saved(attempt: AttemptDir) -> None:
    found = end(attempt, STOPPED, asked=TIMEOUT)
    assert (found.state, found.cause) == ("TIMEOUT", "the time limit was reached, and its work was saved")


def test_cancel_note_makes_it_cancelled(attempt: AttemptDir) -> None:
    attempt.stop.write_text("{}")
    found = end(attempt, -signal.SIGTERM, asked=TIMEOUT)
    assert (found.state, found.cause) == ("CANCELLED", "cancelled by hpc cancel")


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        (-signal.SIGKILL, "", None),
        (137, "", None),
        (1, "slurmstepd: error: Detected 1 oom_kill event", {"cause": "c"}),
        (1, "torch: Cannot allocate memory", {"cause": "c"}),
        (1, "MemoryError", {"cause": "c"}),
    ],
)
def test_memory_kill_is_out_of_memory(attempt: AttemptDir, code: int, log: str, said: dict[str, str] | None) -> None:
    found = end(attempt, code, log=log, said=said, oom_kills=1)
    assert found.state == "OUT_OF_MEMORY"
    assert found.cause == "it needed more host memory than the 16 GiB that were asked for"
    assert "mem_gb = 32" in found.hint


def test_memory_kill_of_a_helper_does_not_hide_the_stages_own_error(attempt: AttemptDir) -> None:
    found = end(attempt, 2, said={"cause": "no data"}, oom_kills=1)
    assert (found.state, found.cause) == ("FAILED", "no data")


def test_memory_kill_counts_more_than_a_cancel(attempt: AttemptDir) -> None:
    attempt.stop.write_text("{}")
    assert end(attempt, -signal.SIGKILL, oom_kills=1).state == "OUT_OF_MEMORY"


def test_container_that_did_not_start_says_apptainers_own_words(attempt: AttemptDir) -> None:
    log = "INFO: x\nFATAL:   could not open image /x.sif: no such file\n"
    found = end(attempt, 255, log=log)
    assert found.cause == "the container could not be started: could not open image /x.sif: no such file"


@pytest.mark.parametrize(("log", "launch"), [("python: said 255", SIF), ("FATAL: not of apptainer", VENV)])
def test_255_of_the_payload_is_the_payloads(attempt: AttemptDir, log: str, launch: Launch) -> None:
    assert end(attempt, 255, log=log, launch=launch).cause == "the stage ended with exit code 255"


@pytest.mark.parametrize(
    ("log", "hint"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "the GPU's memory is full"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ModuleNotFoundError: No module named 'trl'", "the environment lacks a package"),
        ("RuntimeError: CUDA driver version is insufficient for", "image and GPU driver do not fit"),
        ("no kernel image is available for execution", "image and GPU driver do not fit"),
        ("Transport endpoint is not connected", "the image's mount was lost"),
    ],
)
@pytest.mark.parametrize("said", [None, {"cause": "c"}])
def test_log_gives_a_hint(attempt: AttemptDir, log: str, hint: str, said: dict[str, str] | None) -> None:
    assert end(attempt, 1, log=f"before\n{log}\nafter", said=said).hint.startswith(hint)


def test_last_lines_of_the_log_are_kept(attempt: AttemptDir) -> None:
    found = end(attempt, 1, log="\n".join(map(str, range(100))))
    assert found.log_tail == [str(n) for n in range(85, 100)]


# ---- what the signals mean

USR2, TERM, CONT = signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT


@pytest.mark.parametrize(
    ("signals", "elapsed_s", "state"),
    [
        ((), 0, None),
        ((CONT,), 3600, None),
        ((USR2,), 3600 - 90, "TIMEOUT"),
        ((USR2,), 3600 - 90 - 60, "TIMEOUT"),  # Slurm gives it up to a minute early
        ((USR2,), 600, "PREEMPTED"),
        ((TERM,), 600, "CANCELLED"),
        ((TERM,), 3600, "TIMEOUT"),
        ((TERM,), 3596, "TIMEOUT"),
        ((USR2, TERM), 3600, "TIMEOUT"),
        ((USR2, TERM), 600, "PREEMPTED"),
    ],
)
def test_signals_mean(signals: tuple[int, ...], elapsed_s: float, state: str | None) -> None:
    found = asked_to_end(signals, elapsed_s, limit_s=3600, delay_s=90)
    assert (found and found.state) == state
    assert found is None or found.resumable


def test_program_that_is_missing_on_the_node_is_named() -> None:
    found = could_not_start("apptainer", FileNotFoundError(errno.ENOENT, "no"))
    assert found.cause == "apptainer could not be started on this node: No such file or directory"
    assert "setup" in found.hint


def test_full_disk_is_said() -> None:
    found = could_not_start("apptainer", OSError(errno.ENOSPC, "full", "/runs/x/stdout"))
    assert found.cause == "no space is left on the disk that holds the run"


def test_blocked_and_cancelled_name_their_reason() -> None:
    assert blocked("prepare", "FAILED").cause == "its input stage prepare did not complete (FAILED)"
    assert (cancelled().state, cancelled().exit_code) == ("CANCELLED", 143)
