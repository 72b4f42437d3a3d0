"""What a person sees: rows -> a table. On a terminal rich draws it; elsewhere plain columns, whole and uncoloured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any
from unicodedata import east_asian_width

from hpc.login.states import StageState
from hpc.node.gpus import Gpu

STATE_STYLE = {
    "RUNNING": "bold green",
    "COMPLETED": "green",
    "PENDING": "yellow",
    "CANCELLED": "dim",
    "FAILED": "bold red",
    "TIMEOUT": "red",
    "OUT_OF_MEMORY": "bold red",
    "NODE_FAIL": "bold red",
    "PREEMPTED": "magenta",
    "LOST": "red",
    "NOT_SUBMITTED": "dim yellow",
}

Row = Sequence[str]
_DRAWN = 200
"""More rows are plain columns on a terminal too: rich takes half a millisecond for each."""
_LAST_COLUMN = 20
"""The least width of a table's last column, whose text may wrap."""


def status(rows: Sequence[StageState], out: IO[str] = sys.stdout) -> None:
    """The squeue-style table of stages."""
    headings = ("RUN/STAGE", "JOBID", "STATE", "TIME", "LIMIT", "NODE", "PROGRESS / REASON")
    cells = [
        (
            f"{s.run}/{s.stage}",
            s.job_id or "-",
            s.state,
            clock(s.elapsed_s),
            clock(s.limit_min * 60 if s.limit_min else None),
            s.node or "-",
            progress(s),
        )
        for s in rows
    ]
    table(headings, cells, out, style=lambda row: STATE_STYLE.get(row[2], ""), styled=2)


def gpus(rows: Sequence[Row], out: IO[str]) -> None:
    """The table of GPUs; each row is RUN/STAGE, the job, the node and the cells of `gpu`."""
    headings = ("RUN/STAGE", "JOBID", "NODE", "GPU", "USE", "MEMORY", "POWER", "TEMP", "NAME")
    table(headings, rows, out, style=lambda row: "green" if "━" in row[4] else "yellow", styled=4)


def gpu(one: Gpu) -> Row:
    """One GPU in words; a dash where nvidia-smi does not tell."""
    use, used, total = one.utilization, one.memory_used_mib, one.memory_total_mib
    return (
        str(one.index),
        "-" if use is None else f"{bar(use / 100)} {use:3.0f}%",
        "-" if used is None else f"{used / 1024:.1f}" + (f"/{total / 1024:.1f} GiB" if total else " GiB"),
        "-" if one.power_w is None else f"{one.power_w:.0f} W",
        "-" if one.temperature_c is None else f"{one.temperature_c:.0f} °C",
        one.name,
    )


def table(
    headings: Row,
    rows: Sequence[Row],
    out: IO[str] = sys.stdout,
    *,
    style: Callable[[Row], str] | None = None,
    styled: int = -1,
) -> None:
    """A table: with rich on a terminal, plain columns elsewhere. Ids and names are never cut."""
    if not out.isatty() or len(rows) > _DRAWN:
        plain(headings, rows, out)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        last = number == len(headings) - 1
        drawn.add_column(heading, no_wrap=not last, overflow="fold")
    for row in rows:
        cells: list[Any] = [Text(cell) for cell in row]
        if style is not None and 0 <= styled < len(row):
            cells[styled] = Text(row[styled], style=style(row))
        drawn.add_row(*cells)
    console = Console(file=out)
    if rows:  # a narrow terminal breaks the lines itself: rich would cut the ids
        widths = [max(map(_width, column)) for column in zip(headings, *rows, strict=True)]
        console.width = max(console.width, sum(widths[:-1]) + 2 * len(widths) + _LAST_COLUMN)
    console.print(drawn)


def plain(headings: Row, rows: Sequence[Row], out: IO[str]) -> None:
    """Columns padded with blanks.

    >>> plain(("A", "B"), [("1", "long"), ("22", "x")], sys.stdout)
    A   B
    1   long
    22  x
    """
    widths = [max(map(_width, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        line = "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        out.write(line.rstrip() + "\n")


def _width(text: str) -> int:
    """Columns that the text takes on a terminal: Korean, Chinese and Japanese letters take two.

    >>> _width("abc"), _width("한글")
    (3, 4)
    """
    return len(text) if text.isascii() else sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def progress(state: StageState) -> str:
    """The last column: a bar and the latest figures of a running stage, else the reason."""
    if state.state != "RUNNING":
        return state.reason
    if state.endpoint:
        return f"{state.phase} on {state.endpoint}  {state.message}".rstrip()
    if not state.total or (state.phase == "staging" and not state.done):
        return f"{state.phase}  {state.message}".rstrip()
    share = min(1.0, (state.done or 0) / state.total)
    phase = "" if state.phase == "running" else f"{state.phase} "
    return f"{phase}{bar(share)} {share:4.0%}  {state.message}".rstrip()


def bar(share: float, width: int = 12) -> str:
    """A bar of text.

    >>> bar(0.5, 4)
    '━━──'
    """
    full = round(share * width)
    return "━" * full + "─" * (width - full)


def clock(seconds: float | None) -> str:
    """Slurm's way to write a time.

    >>> clock(65), clock(3600), clock(90000), clock(None)
    ('1:05', '1:00:00', '1-01:00:00', '-')
    """
    if seconds is None:
        return "-"
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{secs:02}"
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def bench(document: Mapping[str, Any], out: IO[str]) -> None:
    """Two tables: what was done in all, and how long single requests took; then how far two engines agree."""
    rows = [(e["name"], load_of(level), level) for e in document["endpoints"] for level in e["levels"]]
    goodput = bool(document["slo_ms"])
    totals = [
        (name, load, f"{level['answered']}", f"{sum(level['errors'].values())}", f"{level['seconds']:.1f}",
         f"{level['tokens_per_s']:.1f}", f"{level['requests_per_s']:.2f}",
         *([f"{level['goodput']['requests_per_s']:.2f} ({level['goodput']['share']:.0%})"] if goodput else []))
        for name, load, level in rows
    ]  # fmt: skip
    headings = ("ENDPOINT", "LOAD", "ANSWERED", "ERRORS", "SECONDS", "TOKENS/S", "REQUESTS/S")
    table((*headings, *(["GOODPUT/S"] if goodput else [])), totals, out)
    out.write("\n")
    single = [
        (name, load, words, *(_ms(level[f"{metric}_ms"][key]) for key in ("mean", "p50", "p90", "p95", "p99", "max")))
        for name, load, level in rows
        for metric, words in {"ttft": "first token", "itl": "next token", "e2e": "whole answer"}.items()
        if level[f"{metric}_ms"]
    ]
    if single:
        table(("ENDPOINT", "LOAD", "MILLISECONDS", "MEAN", "P50", "P90", "P95", "P99", "MAX"), single, out)
    for name, load, level in rows:
        for error, number in level["errors"].items():
            out.write(f"\n{name} {load}: {number} × {error}\n")
    agreed = document.get("agreement")
    if agreed and agreed["questions"]:
        out.write(
            f"\ngreedy answers to {agreed['questions']} questions: {agreed['equal']:.0%} are equal, "
            f"and {agreed['common_prefix']:.0%} of an answer's letters are, until the first that differs\n"
        )


def load_of(level: Mapping[str, Any]) -> str:
    """Of one level, as c=8 or 2.5/s."""
    return f"c={level['concurrency']}" if level["concurrency"] else f"{level['rate']:g}/s"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
