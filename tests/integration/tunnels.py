"""The laptop's end of a tunnel. The tests that run side by side share the laptop, and so its ports."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cluster import Cluster

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.count(20000 + 2500 * _WORKER, 4)
"""Each leaves room for a service of four ports; 9999, which `hpc tunnel` takes by itself, is test_jupyter's."""


def wish() -> tuple[str, str]:
    """A local port that no other test has, as options."""
    return "--local-port", str(next(_PORTS))


@contextmanager
def opened(cluster: Cluster, command: str) -> Iterator[subprocess.Popen[str]]:
    """The printed command, as it stands, in a terminal of alice's on the laptop."""
    process = cluster.popen(
        "alice", *shlex.split(command), node="laptop", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _until_it_listens(process, [int(port) for port in re.findall(r"-L localhost:(\d+):", command)])
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=10)


def _until_it_listens(ssh: subprocess.Popen[str], ports: list[int], timeout: float = 20) -> None:
    """By the table of the laptop's sockets: to ask the port would go through to the service."""
    deadline = time.monotonic() + timeout
    while ssh.poll() is None:
        table = Path(f"/proc/{ssh.pid}/net/tcp").read_text()
        if all(f":{port:04X} 00000000:0000 0A" in table for port in ports):
            return
        assert time.monotonic() < deadline, f"ssh listens at none of {ports}, or not all"
        time.sleep(0.1)
    raise AssertionError(ssh.communicate())
