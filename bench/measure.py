"""Paired timing, A B A B …, so that a busy machine slows both alike; and the lines of the table.

As a program it reads the arguments of `processes` as JSON and prints what they took: for another user, elsewhere.
Standard library only.
"""

from __future__ import annotations

import json
import os
import pty
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

HEADINGS = ("what", "median ms", "against", "median ms", "ratio", "of the fastest", "goal", "met?")


class NotMeasured(Exception):
    """It cannot be measured here; the message says what it needs."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Times of two things that were measured in turn, in milliseconds."""

    what: str
    ms: Sequence[float]
    against: str
    against_ms: Sequence[float]
    goal: float | None = None
    """The largest ratio of the medians that is good enough."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ms) / statistics.median(self.against_ms)

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio <= self.goal

    def cells(self) -> tuple[str, ...]:
        digits = 3 if self.goal is not None and self.goal < 1.1 else 2
        return (
            self.what,
            milliseconds(self.ms),
            self.against,
            milliseconds(self.against_ms),
            f"{self.ratio:.{digits}f}",
            f"{min(self.ms) / min(self.against_ms):.{digits}f}",
            f"≤ {self.goal:g}" if self.goal is not None else "",
            word(self.met),
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """Times of a part of the line above; it is compared with nothing."""

    what: str
    ms: Sequence[float]
    met: None = None

    def cells(self) -> tuple[str, ...]:
        return (f"– {self.what}", milliseconds(self.ms), "", "", "", "", "", "")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something that is counted or compared, not timed."""

    what: str
    found: str
    goal: str
    met: bool

    def cells(self) -> tuple[str, ...]:
        return (self.what, self.found, "", "", "", "", self.goal, word(self.met))


@dataclass(frozen=True)
class Skipped:
    """A benchmark that this machine cannot do."""

    what: str
    why: str
    met: None = None

    def cells(self) -> tuple[str, ...]:
        return (self.what, "not measured", self.why, "", "", "", "", "")


Line = Pair | Part | Fact | Skipped
"""One line of the table: its cells, and whether its goal is met (None where it has none)."""


def word(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "**no**"


def milliseconds(ms: Sequence[float]) -> str:
    median = statistics.median(ms)
    return f"{median:.1f}" if median < 100 else f"{median:.0f}"


def processes(
    commands: Mapping[str, Sequence[str]], rounds: int, *, cwd: str | None = None, terminal: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of whole processes, each command once a round; a round before the first fills the file cache."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, argv in commands.items():
            begin = time.perf_counter()
            (_on_terminal if terminal else _in_pipe)(argv, cwd)
            if number:
                taken[name].append((time.perf_counter() - begin) * 1000)
    return taken


def _in_pipe(argv: Sequence[str], cwd: str | None) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"{argv}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _on_terminal(argv: Sequence[str], cwd: str | None) -> None:
    """With a terminal of 80 columns as its output, as when a person types it."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=env)
    os.close(slave)
    shown = b""
    with suppress(OSError):  # EIO: the other end is closed
        while True:
            shown = (shown + os.read(master, 65536))[-2000:]
    os.close(master)
    if process.wait():
        raise SystemExit(f"{argv}: exit {process.returncode}\n{shown.decode(errors='replace')}")


if __name__ == "__main__":
    print(json.dumps(processes(**json.load(sys.stdin))))
