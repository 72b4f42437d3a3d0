"""Which of direct, jump and relay leads to a service here: each is tried, with one that runs."""

from __future__ import annotations

import socket
import subprocess

from hpc.core.endpoint import Endpoint
from hpc.login import asking
from hpc.login.asking import Answer
from hpc.login.tunnel import Way

_NETWORK_S = 3.0
_SSH_S = 15


def tried(way: Way, endpoint: Endpoint, token: str) -> dict[str, Answer]:
    """reach -> what came of it, the simplest way first."""
    return {
        "direct": _direct(endpoint, token),
        "jump": _jump(endpoint.host),
        "relay": asking.through_step(way.line(endpoint), endpoint.health, token),
    }


def _direct(endpoint: Endpoint, token: str) -> Answer:
    if not endpoint.bound.startswith("127."):
        return asking.direct(endpoint.host, endpoint.port, endpoint.health, token)
    try:  # it listens on the loopback alone: a refusal shows that the node itself is reached
        socket.create_connection((endpoint.host, endpoint.port), _NETWORK_S).close()
    except ConnectionRefusedError:
        pass
    except OSError as error:
        return Answer(False, f"its node cannot be reached: {(error.strerror or str(error)).lower()}")
    return Answer(True, "its node is reached")


def _jump(node: str) -> Answer:
    argv = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_NETWORK_S:.0f}", node, "true"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
                              timeout=_SSH_S)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(False, f"ssh to {node} does not work: {error}")
    if done.returncode == 0:
        return Answer(True, f"ssh to {node} works")
    said = done.stderr.strip().splitlines() or ["no message"]
    return Answer(False, f"ssh to {node} does not work: {said[-1]}")
