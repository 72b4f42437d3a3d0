"""The labs by numbers, for a terminal: each choice is a command of `hpc` that could have been typed as well."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hpc.core.errors import HpcError
from hpc.core.rundir import RunsDir
from hpc.login.settings import locate
from hpc.login.states import Scheduler, states

_FINETUNING, _ENGINE = "jupyter", "enginelab"
_OPENED = {_FINETUNING: ["--set", f"{_FINETUNING}.open=finetuning-lab.ipynb"]}
"""What is said at the submission beside the stage's name."""
_CHOICES = """
  1) Finetuning lab: start it, or go to the one that runs
  2) Engine lab: the same
  R) Reset the finetuning lab
  T) Reset the engine lab
  S) Status
  A) The tunnel again, also with another login name
  X) Exit
"""


def menu() -> int:
    """Ask, do, and ask again, until X, the end of the input, or Ctrl-C."""
    actions: dict[str, Callable[[], object]] = {
        "1": lambda: _lab(_FINETUNING),
        "2": lambda: _lab(_ENGINE),
        "r": lambda: _hpc("reset", _FINETUNING),
        "t": lambda: _hpc("reset", _ENGINE),
        "s": lambda: _hpc("status"),
        "a": lambda: _hpc("tunnel", _running(_FINETUNING, _ENGINE) or _FINETUNING),
    }
    while True:
        print(_CHOICES)
        word = _ask("Choose: ")
        if word is None or word.lower() == "x":
            return 0
        if word and word.lower() not in actions:
            print(f"there is no '{word}': type 1, 2, R, T, S, A or X", file=sys.stderr)
        elif word:
            try:
                actions[word.lower()]()
            except HpcError as error:
                print(f"error: {error.message}\n  try: {error.hint}", file=sys.stderr)


def _ask(prompt: str) -> str | None:
    """One line of the user's; None where there is none any more."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _hpc(*arguments: str) -> int:
    """`hpc ARGUMENTS`, with its own messages; its exit code."""
    from hpc.login.cli import main

    return main(arguments)


def _lab(lab: str) -> None:
    found = _running(lab)
    if found is not None:
        print(f"it runs already: {found}")
    elif _hpc("submit", lab, *_OPENED.get(lab, ()), "--wait"):
        return
    _hpc("tunnel", found or lab)  # waits until it answers


def _running(*labs: str) -> str | None:
    """RUN/STAGE of the latest of these labs that runs or waits, whatever its settings were."""
    everything = RunsDir(locate().runs).runs()
    mine = [(run, asked) for run, asked in everything if asked["uid"] == os.getuid() and {*labs} & asked["keys"].keys()]
    scheduler = Scheduler()
    rows = states(mine, scheduler)
    if scheduler.problem is not None:
        raise scheduler.problem
    return next((f"{s.run}/{s.stage}" for s in rows if s.stage in labs and s.active), None)
