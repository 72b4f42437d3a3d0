"""The ranks of one training: how each of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

RANK = "from hpc.inside import together; together.check(); print('at work', flush=True); import time; time.sleep(60)"


def test_rank_ends_with_the_torchrun_that_started_it_even_by_sigkill() -> None:
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}], start_new_session=True)"
    env = {**os.environ, "WORLD_SIZE": "2", "HPC_WORLD_SIZE": "2"}
    torchrun = subprocess.Popen([sys.executable, "-c", starts], env=env, stdout=subprocess.PIPE)
    assert torchrun.stdout is not None
    assert torchrun.stdout.readline() == b"at work\n"
    os.kill(torchrun.pid, signal.SIGKILL)
    torchrun.communicate(timeout=5)  # until the rank too has closed it
