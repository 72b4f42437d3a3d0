"""
One node's ranks of a stage, started by torchrun: python3 -m hpc.inside.ranks STAGE CONFIG.json ATTEMPT_DIR

Where the ranks meet, the first node decides: a port that is free there, told in a file of the attempt. The scheduler's
requests are passed on to the ranks, which save and end by themselves; torchrun would kill them 30 s after a request.
See docs/adr/0030.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from hpc.core import rundir
from hpc.core.errors import STOPPED, HpcError
from hpc.inside import once, service, together

_POLL_S = 0.2
_MEET_S = 3600
"""So long a node waits for the first one, which may still be copying its image."""


def main(argv: list[str]) -> int:
    document = rundir.read_json(Path(argv[1])) or {}
    nodes, each = document["resources"]["nodes"], max(1, document["resources"]["gpus_per_node"])
    attempt = rundir.AttemptDir(Path(argv[2]))
    node = rundir.task_number(nodes)
    attempt.stopped.unlink(missing_ok=True)
    # inherited by the ranks, which take the requests once they can; here a thread takes them
    signal.pthread_sigmask(signal.SIG_BLOCK, once.REQUESTS)
    threading.Thread(target=_pass_on, daemon=True).start()
    host, port = meet(attempt, node, nodes, os.environ)
    os.environ[together.MEANT] = str(nodes * each)
    if "OMP_NUM_THREADS" in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ["OMP_NUM_THREADS"]) // each))
    if nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return _torchrun(
        ["--nnodes", str(nodes), "--node-rank", str(node), "--nproc-per-node", str(each), "--max-restarts", "0",
         "--master-addr", host, "--master-port", str(port), "-m", "hpc.inside.runner", *argv],
        attempt,
    )  # fmt: skip


def _torchrun(argv: list[str], attempt: rundir.AttemptDir) -> int:
    """torchrun in this process. Its exit code is that of the first rank that failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 128 - int(failure.exitcode)
    return STOPPED if attempt.stopped.exists() else 0


def meet(attempt: rundir.AttemptDir, node: int, nodes: int, env: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of the first rank. Each start of the job has its own file: a requeued one finds the old."""
    if nodes == 1:
        return "127.0.0.1", _free_port()
    path = attempt.path / f"meeting-{env.get('SLURM_JOB_ID', '0')}-{env.get('SLURM_RESTART_COUNT', '0')}.json"
    if node == 0:
        host, port = env.get("SLURMD_NODENAME") or socket.gethostname(), _free_port()
        rundir.write_json(path, {"host": host, "port": port})
        return host, port
    deadline = time.monotonic() + _MEET_S
    while (found := rundir.read_json(path)) is None:
        if time.monotonic() > deadline:
            raise HpcError("the first node of the job has not begun", hint="`hpc logs` shows what it does")
        time.sleep(_POLL_S)
    return found["host"], found["port"]


def _free_port() -> int:
    """Of those that the kernel gives to no client: seconds go by until the first rank listens there."""
    return service.free_ports(("ranks",), 0, "")["ranks"]


def _pass_on() -> None:
    """Give every request to the ranks; without ranks yet, end as the request would have ended this process."""
    while True:
        number = signal.sigwait(once.REQUESTS)
        children = _children()
        if not children:
            os._exit(STOPPED)
        for pid in children:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def _children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
