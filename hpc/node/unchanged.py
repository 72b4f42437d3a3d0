"""What a stage reads of the user's is, right before it begins, what its key was made of.

A large file that nobody touched since it was planned with is known without being read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpc.core.digest import Digests
from hpc.core.errors import VerificationFailed
from hpc.core.rundir import RunsDir, StageDir, read_json


def check(stage_dir: StageDir, reading: Callable[[str], None] = lambda text: None) -> None:
    """VerificationFailed where a file or folder is another one by now; `reading` tells which large file is read."""
    digests = Digests(RunsDir(stage_dir.path.parent.parent).digests, reading)
    for path, planned in (read_json(stage_dir.config) or {}).get("reads", {}).items():
        if digests.of(Path(path)) != planned:
            raise VerificationFailed(
                f"{path} has changed since {stage_dir.name} was submitted",
                hint="submit again: what it holds now gets a result of its own; or put back what it held",
            )
