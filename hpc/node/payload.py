"""The end of a stage that runs in no image: its manifest, or why there is none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.errors import HpcError
from hpc.core.rundir import AttemptDir, StageDir

Document = Mapping[str, Any]
"""config.json."""


def run(argv: list[str], work: Callable[[Document, AttemptDir], Mapping[str, Any]]) -> int:
    """Do the work of STAGE_DIR ATTEMPT_DIR; what it gives are the manifest's metrics. The exit code."""
    stage_dir, attempt = StageDir(Path(argv[0])), AttemptDir(Path(argv[1]))
    document = rundir.read_json(stage_dir.config) or {}
    started = time.time()
    try:
        metrics = work(document, attempt)
    except HpcError as error:
        cause = _line(error.message)
        rundir.write_json(attempt.error, {"cause": cause, "hint": error.hint, "exit_code": error.exit_code})
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    manifest = {
        "schema": "hpc.manifest/1",
        **{name: document[name] for name in ("stage", "key", "inputs", "environment", "outputs")},
        "metrics": metrics,
        "versions": {"python": sys.version.split()[0]},
        "started": started,
        "ended": time.time(),
        "host": os.uname().nodename,
    }
    rundir.write_json(stage_dir.manifest, manifest, durable=True)
    return 0


def _line(message: str) -> str:
    r"""One line: the first, and the last of those that a program printed. The log has all of them.

    >>> _line("it failed:\n  step 1\n  FATAL:   no room"), _line("it failed")
    ('it failed: FATAL: no room', 'it failed')
    """
    lines = [" ".join(line.split()) for line in message.splitlines()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
