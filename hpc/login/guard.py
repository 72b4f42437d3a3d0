"""Cleans up after a tunnel, however the program that held it ended: kill -9 too. A program of its own.

Each line of stdin is what is to be done once stdin ends, and replaces the line before:
{"commands": [ARGV, …], "pids": [PID, …], "folder": PATH}. The standard library alone, started by path.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

_GRACE_S = 2.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    task: dict[str, Any] = {"commands": [], "pids": [], "folder": None}
    for line in sys.stdin:
        with contextlib.suppress(ValueError):  # half a line: the one before holds
            task = json.loads(line)
    for argv in task["commands"]:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_GRACE_S)
    end(task["pids"])
    if task["folder"]:
        shutil.rmtree(task["folder"], ignore_errors=True)


def end(pids: list[int]) -> None:
    """SIGTERM, and SIGKILL to what is there still a little later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + _GRACE_S
        while (pids := [pid for pid in pids if _is_there(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's by now
        return False
    return True


if __name__ == "__main__":
    main()
