"""Work on many cores: in order, and with nothing left of it behind a process that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpc.inside.parallel import Workers

AT_WORK = """
import time
from multiprocessing import forkserver
from hpc.inside.parallel import Workers
with Workers(2) as workers:
    list(workers.map(time.sleep, [0.1] * 2))
    print(forkserver._forkserver._forkserver_pid, *workers._pool._processes, flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_results_come_in_order_on_any_number_of_cores() -> None:
    tasks = [str(number) for number in range(50)]
    for count in (1, 2):
        with Workers(count) as workers:
            assert list(workers.map(int, tasks)) == list(range(50))


def test_workers_and_their_fork_server_end_with_a_process_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", AT_WORK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
