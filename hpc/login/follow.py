"""Waiting for a run, with progress on a terminal or plain lines in a log; and printing what a stage prints."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hpc.core import rundir
from hpc.core.errors import Interrupted
from hpc.core.rundir import AttemptDir, RunDir
from hpc.login import streams, view
from hpc.login.states import Scheduler, StageState, states
from hpc.node import outcome

_LOOK_S = 1.0
"""Between two looks at the run's own files."""
_ASK_S = 10.0
"""Between two questions to Slurm."""
_LINE_S = 15.0
"""Between two progress lines where there is no terminal."""
_PIECE = 1 << 16
"""Bytes of a log that are read at once."""

Show = Callable[[Sequence[StageState]], None]


def wait(run: RunDir, stages: Sequence[str], out: IO[str]) -> int:
    """Until every one of the stages has ended, or serves. 0: so it is; 8: stopped and resumable; 1: failed."""
    asked = rundir.read_json(run.run) or {}
    try:
        with _display(out) as show:
            rows = _watch(run, asked, stages, show)
    except KeyboardInterrupt:
        raise Interrupted(
            f"no longer waiting; {run.id} goes on",
            hint=f"hpc status {run.id}, or hpc cancel {run.id} to end it",
        ) from None
    serving = [s for s in rows if s.endpoint]
    bad = [s for s in rows if s.state != "COMPLETED" and s not in serving]
    for state in bad:
        _say_end(run, state, out)
    if not bad:
        done = ", ".join(s.stage for s in rows if s not in serving)
        if done:
            _tell(out, f"{run.id}: {done} completed")
        for state in serving:
            _tell(out, f"{run.id}/{state.stage} is ready on {state.endpoint}: hpc tunnel {run.id}/{state.stage}")
        return 0
    first = next((s for s in bad if s.state != "CANCELLED"), bad[0])
    return 8 if first.resumable and first.state in {"TIMEOUT", "PREEMPTED", "NODE_FAIL"} else 1


def _watch(run: RunDir, asked: dict[str, object], stages: Sequence[str], show: Show) -> list[StageState]:
    scheduler, asked_at = Scheduler(), time.monotonic()
    while True:
        rows = [s for s in states([(run, asked)], scheduler) if s.stage in stages]
        show(rows)
        ended = not any((s.active and not s.endpoint) or s.state == "UNKNOWN" for s in rows)
        fresh = time.monotonic() - asked_at < _LOOK_S
        if ended and fresh:
            return rows
        time.sleep(_LOOK_S)
        if ended or time.monotonic() - asked_at > _ASK_S or _something_ended(run, rows):
            scheduler, asked_at = Scheduler(), time.monotonic()


def _something_ended(run: RunDir, rows: Sequence[StageState]) -> bool:
    """True where an outcome appeared since Slurm was asked: what comes next may have changed."""
    return any(s.active and run.stage(s.stage).attempt(s.attempt).outcome.exists() for s in rows)


def _say_end(run: RunDir, state: StageState, out: IO[str]) -> None:
    _tell(out, f"{run.id}/{state.stage}: {state.state}: {state.reason or 'no reason known'}")
    ended = outcome.read(run.stage(state.stage).attempt(state.attempt)) or {}
    for line in ended.get("log_tail", []):
        _tell(out, f"  | {line}")
    if state.hint:
        _tell(out, f"  try: {state.hint}")


def _tell(out: IO[str], text: str) -> None:
    """Print a line. Where nobody reads them any more (`hpc submit --wait 2>&1 | head`), the waiting goes on."""
    try:
        print(text, file=out, flush=True)
    except BrokenPipeError:
        streams.to_nowhere(out)


@contextmanager
def _display(out: IO[str]) -> Iterator[Show]:
    """How progress is shown: bars that move on a terminal, now and then a line elsewhere."""
    if not out.isatty():
        yield _lines(out)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[said]}", markup=False))  # fmt: skip
    with Progress(*columns, console=Console(file=out)) as drawn:
        tasks: dict[str, object] = {}

        def show(rows: Sequence[StageState]) -> None:
            for s in rows:
                if s.stage not in tasks:
                    tasks[s.stage] = drawn.add_task(s.stage, total=1, said="", start=False)
                task = tasks[s.stage]
                if s.state == "RUNNING":
                    drawn.start_task(task)  # type: ignore[arg-type]
                share = 1.0 if s.state == "COMPLETED" else (s.done or 0) / s.total if s.total else 0.0
                now = s.message if s.phase == "running" and s.message else f"{s.phase} {s.message}".rstrip()
                said = now if s.state == "RUNNING" else s.state + (f": {s.reason}" if s.reason else "")
                drawn.update(task, completed=share, said=said)  # type: ignore[arg-type]
                if not s.active:
                    drawn.stop_task(task)  # type: ignore[arg-type]

        yield show


def _lines(out: IO[str]) -> Show:
    last: dict[str, tuple[str, float]] = {}

    def show(rows: Sequence[StageState]) -> None:
        now = time.monotonic()
        for s in rows:
            text = f"{s.run}/{s.stage} {s.state} {view.progress(s)}".rstrip()
            state, when = last.get(s.stage, ("", 0.0))
            if s.state != state or (s.state == "RUNNING" and now - when >= _LINE_S):
                last[s.stage] = (s.state, now)
                _tell(out, text)

    return show


def logs(
    attempt: AttemptDir, out: IO[str], *, lines: int | None, follow: bool, active: Callable[[], bool] = lambda: True
) -> None:
    """The stage's stdout and stderr, or the last lines of each.

    With `follow` until it has ended: its outcome is there, or `active` says no.
    """
    files = [_Growing(attempt.stdout), _Growing(attempt.stderr)]
    for file in files:
        if lines is not None:
            file.skip_to_last(lines)
        out.writelines(file.more())
    asked_at = time.monotonic()
    while follow:
        ended = attempt.outcome.exists()
        if not ended and time.monotonic() - asked_at > _ASK_S:
            ended, asked_at = not active(), time.monotonic()
        for file in files:
            out.writelines(file.more())
        out.flush()
        if ended:
            return
        time.sleep(0.3)


class _Growing:
    """A log that is written to while it is read. A letter of several bytes may be there only in part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def skip_to_last(self, lines: int) -> None:
        """What comes next are its last lines, and what is written after them."""
        size = _PIECE
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            while True:
                end = file.seek(0, os.SEEK_END)
                start = file.seek(max(0, end - size))
                last = file.read(end - start).splitlines(keepends=True)
                if start == 0 or len(last) > lines:  # the first of them may be half a line
                    break
                size *= 2
            self._place = end - sum(map(len, last[-lines:] if lines else []))

    def more(self) -> Iterator[str]:
        """What is there now, a piece at a time."""
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._place)
            while new := file.read(_PIECE):
                self._place += len(new)
                yield self._decoder.decode(new)
