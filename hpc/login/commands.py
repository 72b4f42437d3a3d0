"""One function per verb: settings -> plan -> submission, or the run folders -> what is printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from hpc.core.errors import NotFound, RuntimeUnavailable, UsageError
from hpc.login import view
from hpc.login.reporting import report
from hpc.login.states import UNKNOWN, Scheduler, StageState, states
from hpc.login.talk import bench, chat, query
from hpc.login.targets import asked as _asked
from hpc.login.targets import find as _find
from hpc.login.targets import mine as _mine
from hpc.login.targets import runs as _runs
from hpc.login.targets import target as _target
from hpc.login.targets import way as _way

__all__ = ["bench", "chat", "query", "report"]

_LATEST = 10


def stages(options: argparse.Namespace) -> int:
    from hpc.login import catalogue

    rows = catalogue.rows()
    if options.json:
        _print_json("hpc.stages/1", stages=rows)
    else:
        catalogue.show(rows)
    return 0


def plan(options: argparse.Namespace) -> int:
    from hpc.login.planning import make

    work = make(options, Scheduler(), _chatter)
    if options.json:
        _print_json("hpc.plan/1", **work.document())
        return 0
    work.show(sys.stdout)
    return 0


def submit(options: argparse.Namespace) -> int:
    from hpc.login import follow, succession
    from hpc.login.planning import make, on_login_node
    from hpc.login.planning import submit as submit_all

    scheduler = Scheduler()
    work = make(options, scheduler, _chatter)
    if options.dry_run:
        if options.json:
            notes = list(work.submission.plan.notes)
            _print_json("hpc.dry-run/1", run=work.submission.run.id, notes=notes, stages=work.dry_run())
        else:
            work.show_dry_run(sys.stdout)
        return 0
    for note in work.submission.plan.notes:
        _chatter(f"note: {note}")
    if on_login_node(work.settings, work.submission):
        from hpc.login import here

        work, code = here.first(options, work, scheduler, _chatter)
        if code:
            return code
    submission = work.submission
    if not submission.placed:  # every stage has said in a note why it has nothing to do
        if options.json:
            _print_json("hpc.submit/1", run=None, folder=None, stages=[])
        return 0
    quiet = options.json or options.wait
    if submission.todo or submission.is_new or options.replace:
        work = submit_all(work, scheduler, (lambda text: None) if quiet else _chatter)
        submission = work.submission
    code = 0
    if options.wait and options.replace:
        succession.wait(submission.run, submission.successors[options.target][0], _chatter)
    elif options.wait:
        code = follow.wait(submission.run, list(submission.plan.keys), sys.stderr)
    if options.json:
        rows = states([(submission.run, _asked(submission.run))], Scheduler())
        _print_json("hpc.submit/1", run=submission.run.id, folder=str(submission.run.path), **_rows(rows))
    else:
        work.show_submitted(sys.stdout, waited=options.wait)
    return code


def status(options: argparse.Namespace) -> int:
    if options.watch:
        return _watch(options)
    return _status_once(options)


def _status_once(options: argparse.Namespace) -> int:
    runs = _runs()
    everything = list(runs.runs())
    if options.run:
        run, stage = _find(options.run, everything)
        chosen = [(run, _asked(run))]
    else:
        stage = None
        chosen = [(r, a) for r, a in everything if a["uid"] == os.getuid()]
    scheduler = Scheduler()
    rows = [s for s in states(chosen, scheduler) if stage is None or s.stage == stage]
    hidden = 0
    if not options.all and not options.run:
        rows, hidden = _recent(rows)
    if options.json:
        problem = scheduler.problem
        said = {"problem": problem.message, "hint": problem.hint} if problem else {}
        _print_json("hpc.status/1", runs_folder=str(runs.path), **_rows(rows), **said)
        return problem.exit_code if problem else 0
    elif not rows:
        print(f"no runs in {runs.path}; `hpc submit pipeline` starts one", file=sys.stderr)
    else:
        view.status(rows)
        if hidden:
            print(f"{hidden} earlier runs: hpc status --all", file=sys.stderr)
        _hints(rows)
    if scheduler.problem is not None:
        raise scheduler.problem
    return 0


def _recent(rows: Sequence[StageState]) -> tuple[list[StageState], int]:
    """The latest runs, and every run with a stage that is still at work; how many were left out."""
    order = list(dict.fromkeys(s.run for s in rows))
    shown = {*order[:_LATEST], *(s.run for s in rows if s.active)}
    return [s for s in rows if s.run in shown], len(order) - len(shown)


def _hints(rows: Sequence[StageState]) -> None:
    for state in rows:
        if state.hint and state.state not in {"COMPLETED", "RUNNING", "PENDING"} and state.run == rows[0].run:
            print(f"{state.run}/{state.stage}: {state.hint}", file=sys.stderr)


def _watch(options: argparse.Namespace) -> int:
    every_s = 5
    with suppress(KeyboardInterrupt):
        while True:
            if sys.stdout.isatty():
                print("\033[H\033[2J", end="")
            try:
                _status_once(options)
            except RuntimeUnavailable as error:  # a hiccup of the controller: look again
                print(f"{error.message}; looking again in {every_s} s", file=sys.stderr)
            sys.stdout.flush()
            time.sleep(every_s)
    return 0


def logs(options: argparse.Namespace) -> int:
    from hpc.login import follow

    if options.lines is not None and options.lines < 0:
        raise UsageError(f"-n {options.lines}: too small", hint="0 or more")
    run, stage = _target(options.target)
    rows = states([(run, _asked(run))], Scheduler())
    submitted = [s for s in rows if s.attempt and (stage is None or s.stage == stage)]
    if not submitted:
        raise NotFound(f"{run.id} has no log yet", hint=f"`hpc status {run.id}` shows where it stands")
    begun = [s for s in submitted if run.stage(s.stage).attempt(s.attempt).launch.exists()]
    awaited = options.follow and any(s.active for s in submitted)
    # without a stage: the one that failed, else the one at work, else the last that has begun, or is waited for
    last = (submitted if awaited else begun or submitted)[-1]
    chosen = next((s for wanted in (_bad, _running) for s in submitted if wanted(s)), last)
    attempt = run.stage(chosen.stage).attempt(chosen.attempt)
    print(f"==> {run.id}/{chosen.stage} attempt {chosen.attempt}: {chosen.state} <==", file=sys.stderr)

    def active() -> bool:
        rows = states([(run, _asked(run))], Scheduler())
        return any(s.stage == chosen.stage and (s.active or s.state == UNKNOWN) for s in rows)

    follow.logs(attempt, sys.stdout, lines=options.lines, follow=options.follow and chosen.active, active=active)
    return 0


def _bad(state: StageState) -> bool:
    return not state.active and state.state not in {"COMPLETED", "CANCELLED", "NOT_SUBMITTED"}


def _running(state: StageState) -> bool:
    return state.state == "RUNNING"


def cancel(options: argparse.Namespace) -> int:
    from hpc.login.cancel import cancel as cancel_jobs

    run, stage = _target(options.target)
    scheduler = Scheduler()
    rows = states([(run, _asked(run))], scheduler)
    if scheduler.problem is not None:
        raise scheduler.problem
    chosen = [s for s in rows if s.active and (stage is None or s.stage == stage)]
    cancel_jobs(run, chosen)
    if options.json:
        _print_json("hpc.cancel/1", run=run.id, cancelled=[{"stage": s.stage, "job_id": s.job_id} for s in chosen])
    elif chosen:
        for state in chosen:
            print(f"{run.id}/{state.stage}: job {state.job_id} cancelled")
    else:
        print(f"{options.target or run.id}: nothing is running or waiting", file=sys.stderr)
    return 0


def reset(options: argparse.Namespace) -> int:
    from hpc.login.reset import run as reset_one

    mine = _mine()
    run, stage = _find(options.target, mine)
    # of a stage alone: in whichever run there is something to reset
    runs = [(r, a) for r, a in mine if stage in a["keys"]] if options.target == stage else [(run, _asked(run))]
    document = reset_one(runs, stage, options)
    if options.json:
        _print_json("hpc.reset/1", **document)
    return 0


def menu(options: argparse.Namespace) -> int:
    from hpc.login.menu import menu as by_numbers

    return by_numbers()


def tunnel(options: argparse.Namespace) -> int:
    from hpc.core.errors import NotReady
    from hpc.login import tunnel as tunnels

    if options.explain is not None:
        return _explain(options)
    way = _way(options.target)
    if options.stop:
        return tunnels.stop(way)
    name = tunnels.login_name(options.login, way.site, quiet=options.json)
    try:
        for_login = tunnels.find(way, host=options.host, first=options.local_port, wait=not options.no_wait)
    except NotReady:
        for line in way.service.last_lines():
            print(f"  | {line}", file=sys.stderr)
        raise
    found = for_login(name or tunnels.me())
    if options.json:
        _print_json("hpc.tunnel/1", **asdict(found))
    else:
        from hpc.login import steps

        sys.stdout.write(steps.text(found, time.time()))
    sys.stdout.flush()
    try:
        kept = tunnels.keep(for_login("LOGIN") if name else found, way.service.run)
    except (OSError, UsageError) as error:  # a full home, or none
        _chatter(f"\nnot kept for later: {error}")
    else:
        if not options.json:
            _chatter(f"\nthe same in {kept}, for you alone{', without the login name' if name else ''}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    """0: the text says something that is known; 1: it does not."""
    from hpc.login import tunnel as tunnels

    text = sys.stdin.read() if options.explain == "-" else options.explain
    try:
        way = _way(options.target)
    except NotFound:
        if options.target:
            raise
        way = None
    found = tunnels.explained(text, way)
    if options.json:
        _print_json("hpc.explain/1", **found)
    else:
        tunnels.tell(found)
    return 0 if found["matches"] else 1


def top(options: argparse.Namespace) -> int:
    from hpc.login import top as gpus

    if not options.interval >= gpus.LEAST_S:
        raise UsageError(f"--interval {options.interval:g}: too short", hint=f"{gpus.LEAST_S:g} seconds or more")
    chosen, stage = None, None
    if options.target:
        run, stage = _find(options.target, _mine())
        chosen = [(run, _asked(run))]

    def running() -> list[StageState]:
        scheduler = Scheduler()
        rows = states(chosen or _mine(), scheduler)
        if scheduler.problem is not None:
            raise scheduler.problem
        return [s for s in rows if _running(s) and (stage is None or s.stage == stage)]

    if not (options.json or options.once) and sys.stdout.isatty():
        gpus.live(running, options.interval)
        return 0
    found = gpus.once(running())
    if options.json:
        _print_json("hpc.top/1", **gpus.document(found))
    else:
        gpus.show(found, sys.stdout, sys.stderr)
    return 0


def shell(options: argparse.Namespace) -> int:
    from hpc.login import shell as shells

    run, stage = _target(options.target)
    scheduler = Scheduler()
    rows = states([(run, _asked(run))], scheduler)
    if scheduler.problem is not None:
        raise scheduler.problem
    return shells.enter(run, shells.choose(run, stage, rows), options.program, options.node)


def doctor(options: argparse.Namespace) -> int:
    from hpc.login import doctor as checks

    found = checks.examine(options.site)
    if options.json:
        _print_json("hpc.doctor/1", checks=[asdict(c) for c in found])
    else:
        for check in found:
            print(f"{check.verdict:<8}{check.what}: {check.found}")
            if check.hint:
                print(f"        try: {check.hint}")
    return 0 if all(c.verdict != "missing" for c in found) else 1


def images(options: argparse.Namespace) -> int:
    from hpc.login.images import run

    code, schema, document = run(options)
    if options.json:
        _print_json(schema, **document)
    return code


def _rows(rows: Sequence[StageState]) -> dict[str, Any]:
    return {"stages": [asdict(s) for s in rows]}


def _chatter(text: str) -> None:
    with suppress(OSError):  # `hpc submit 2>&1 | head`, a full disk: what is said beside the work does not end it
        print(text, file=sys.stderr, flush=True)


def _print_json(schema: str, **fields: Any) -> None:
    print(json.dumps({"schema": schema, **fields}, ensure_ascii=False, indent=1))
