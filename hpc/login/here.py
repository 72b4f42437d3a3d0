"""What needs the internet, on the login node, where the site's nodes have none: before the rest is submitted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from hpc.login import follow, planning
from hpc.login.settings import Layer
from hpc.login.states import Scheduler

_HERE = Layer('network = "login"', {"site": {"scheduler": "local", "gpus": "none"}})


def first(
    options: argparse.Namespace, work: planning.Work, scheduler: Scheduler, say: Callable[[str], None]
) -> tuple[planning.Work, int]:
    """(the work that is left, 0), or (this work, exit code) where something of it failed here."""
    for name in planning.on_login_node(work.settings, work.submission):
        say(f"{name}: runs on this login node, which has the network that the site's nodes lack")
        here = planning.make(options, scheduler, say, only=[name], over=[_HERE])
        if here.submission.todo or here.submission.is_new:
            here = planning.submit(here, scheduler, lambda text: None)
        code = follow.wait(here.submission.run, [name], sys.stderr)
        if code:
            return work, code
        work = planning.make(options, scheduler, lambda text: None)
    return work, 0
