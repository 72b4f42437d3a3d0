"""The benchmarks: run.py [NAME...] [--runs N] [--json] [--write]

Without a name: all, and docs/benchmarks.md gets their tables; with --write those of the named ones. Each table has the
day, the machine and the load of its own run. Exit code 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from measure import HEADINGS, Line, NotMeasured, Skipped

NAMES = (
    "start", "status", "submit", "staging", "tunnel", "client", "container", "modes", "data", "finetune",
    "merge", "serving",
)  # fmt: skip
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Run:
    """One benchmark as it was measured."""

    name: str
    machine: str
    lines: Sequence[Line]

    @property
    def whole(self) -> bool:
        return not any(isinstance(line, Skipped) for line in self.lines)

    def text(self) -> str:
        return f"{self.machine}.\n\n{table(self.lines)}\n"


def main() -> int:
    asked = argparse.ArgumentParser(description="Measure; without a NAME everything, into docs/benchmarks.md.")
    asked.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    asked.add_argument("--runs", type=int, metavar="N", help="pairs of processes or jobs (default: each its own)")
    asked.add_argument("--json", action="store_true", help="one JSON document on stdout")
    asked.add_argument("--write", action="store_true", help="the tables of the named ones into docs/benchmarks.md too")
    options = asked.parse_args()
    if unknown := set(options.names) - {*NAMES}:
        asked.error(f"there is no {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    runs = []
    for name in options.names or NAMES:
        runs.append(run(name, options.runs))
        if (options.write or not options.names) and runs[-1].whole:
            write(runs[-1])
    if options.json:
        told = [{"name": r.name, "machine": r.machine, "lines": list(map(document, r.lines))} for r in runs]
        print(json.dumps({"schema": "hpc.benchmarks/2", "benchmarks": told}, ensure_ascii=False, indent=1))
    else:
        print(*(f"{r.name}: {r.text()}" for r in runs), sep="\n")
    return 1 if any(line.met is False for r in runs for line in r.lines) else 0


def run(name: str, rounds: int | None) -> Run:
    head = machine()
    lines = list(measured(name, rounds))
    return Run(name, f"{head}; load {os.getloadavg()[0]:.1f} at the end", lines)


def document(line: Line) -> dict[str, Any]:
    return {"kind": type(line).__name__.lower(), **asdict(line), "met": line.met}


def measured(name: str, rounds: int | None) -> Iterator[Line]:
    """The lines of one benchmark, told on stderr as they come."""
    module = importlib.import_module(name)
    try:
        for line in module.lines(rounds or module.ROUNDS):
            print(*filter(None, line.cells()), sep=" | ", file=sys.stderr, flush=True)
            yield line
    except NotMeasured as reason:
        print(f"{name}: NOT MEASURED, {reason}", file=sys.stderr)
        yield Skipped(name, str(reason))


def machine() -> str:
    """When and where: versions, cores, and how busy they are already."""
    versions = [f"{name} {metadata.version(name)}" for name in ("hpc-batch", "submitit", "rich")]
    for argv in (["sinfo", "--version"], ["apptainer", "--version"]):
        if shutil.which(argv[0]):
            versions.append(subprocess.run(argv, capture_output=True, text=True).stdout.strip())
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
    parts = (time.strftime("%Y-%m-%d"), platform.platform(), f"Python {platform.python_version()}", *versions, load)
    return ", ".join(parts)


def table(lines: Sequence[Line]) -> str:
    """The lines in Markdown, with columns of even width."""
    rows = [HEADINGS, *(line.cells() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def write(one: Run) -> None:
    """Put its table into the document, in place of the one that is there."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    inside, _, after = rest.partition(END)
    there = dict(re.findall(r"^### `(\w+)`\n\n(.*?)(?=^###|\Z)", inside, re.MULTILINE | re.DOTALL))
    there[one.name] = f"{one.text()}\n"
    texts = "".join(f"### `{name}`\n\n{there[name]}" for name in NAMES if name in there)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{texts}{END}{after}", encoding="utf-8")
    print(f"docs/{DOCUMENT.name} is written: {one.name}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
