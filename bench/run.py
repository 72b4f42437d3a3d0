"""The benchmarks: run.py [NAME...] [--runs N] [--json]

Without a name: all, and docs/benchmarks.md gets the table. Exit code 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from measure import HEADINGS, Line, NotMeasured, Skipped

NAMES = (
    "start", "status", "submit", "staging", "tunnel", "client", "container", "modes", "data", "finetune",
    "merge", "serving",
)  # fmt: skip
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> int:
    asked = argparse.ArgumentParser(description="Measure; without a NAME everything, into docs/benchmarks.md.")
    asked.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    asked.add_argument("--runs", type=int, metavar="N", help="pairs of processes or jobs (default: each its own)")
    asked.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = asked.parse_args()
    if unknown := set(options.names) - {*NAMES}:
        asked.error(f"there is no {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    head = machine()
    found = [line for name in options.names or NAMES for line in measured(name, options.runs)]
    head += f"; load {os.getloadavg()[1]:.1f} at the end"
    if options.json:
        lines = [{"kind": type(line).__name__.lower(), **asdict(line), "met": line.met} for line in found]
        print(json.dumps({"schema": "hpc.benchmarks/1", "machine": head, "lines": lines}, ensure_ascii=False, indent=1))
    else:
        print(head, "", table(found), sep="\n")
    if not options.names:
        write(head, found)
    return 1 if any(line.met is False for line in found) else 0


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
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} at the start"
    parts = (time.strftime("%Y-%m-%d"), platform.platform(), f"Python {platform.python_version()}", *versions, load)
    return ", ".join(parts)


def table(lines: Sequence[Line]) -> str:
    """The lines in Markdown, with columns of even width."""
    rows = [HEADINGS, *(line.cells() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def write(head: str, lines: Sequence[Line]) -> None:
    """Put the table between the two marks of the document; nothing where a part of it is missing."""
    if any(isinstance(line, Skipped) for line in lines):
        print(f"{DOCUMENT.name} is left as it is: not everything was measured", file=sys.stderr)
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{head}.\n\n{table(lines)}\n{END}{after}", encoding="utf-8")
    print(f"docs/{DOCUMENT.name} is written", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
