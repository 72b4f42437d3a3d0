"""The user's own folder for what nobody else may read: printed tunnels, the sockets of a relay."""

from __future__ import annotations

import os
from pathlib import Path

from hpc.core import rundir
from hpc.core.errors import UsageError


def folder() -> Path:
    """${XDG_STATE_HOME:-~/.local/state}/hpc, open to its owner alone. UsageError where there is none."""
    path = Path(os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state")) / "hpc"
    if str(path).startswith("~"):
        raise UsageError("you have no home folder here", hint="let XDG_STATE_HOME name a folder of your own")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise UsageError(f"{path} belongs to somebody else", hint="let XDG_STATE_HOME name a folder of your own")
    path.chmod(0o700)
    return path


def write(name: str, text: str) -> Path:
    """Replace a file of that folder; only its owner can read it."""
    path = folder() / name
    rundir.write_text(path, text, mode=0o600)
    return path
