"""`hpc report`: a run's facts as a page in its folder, on stdout, or as a document."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hpc.core import rundir
from hpc.core.errors import UsageError
from hpc.core.rundir import RunDir


def report(options: argparse.Namespace) -> int:
    """Slurm that can't be reached is told on the page."""
    from hpc.login import page, targets
    from hpc.login.report import collect
    from hpc.login.states import Scheduler, states

    run, stage = targets.target(options.target)
    if stage and options.target != stage:
        raise UsageError("a report is of a whole run", hint=f"hpc report {run.id}")
    if options.json and options.output:
        raise UsageError("--json is a document on stdout, and -o a page", hint="give one of them")
    asked, scheduler = targets.asked(run), Scheduler()
    rows = states([(run, asked)], scheduler)
    found = collect(run, asked, rows, scheduler.problem.message if scheduler.problem else "")
    if options.json:
        document = json.dumps({"schema": "hpc.report/1", **found.document()}, ensure_ascii=False, indent=1)
        print(_without_tokens(document, run))
        return 0
    text = _without_tokens(page.render(found), run)
    if options.output == "-":
        sys.stdout.write(text)
        return 0
    path = Path(options.output).resolve() if options.output else run.report  # a link stays one
    if path.is_dir():
        raise UsageError(f"{options.output} is a folder", hint=f"hpc report {run.id} -o {options.output}/{run.id}.html")
    rundir.write_text(path, text.encode("utf-8", "replace").decode(), mode=0o600)
    print(path)
    return 0


def _without_tokens(text: str, run: RunDir) -> str:
    """A model may have said, or an error quoted, what opens the run's services."""
    for path in run.path.glob("*/token"):
        token = path.read_text(encoding="utf-8", errors="replace").strip()
        text = text.replace(token, "[token]") if token else text
    return text
