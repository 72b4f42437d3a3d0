"""Tunnels that are open on this machine: local port -> the token, in a file of the user's own, for other commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpc.core import rundir
from hpc.login import private


def note(ports: Mapping[str, int], token: str) -> None:
    """A tunnel is open on these ports; the first one is that of HTTP."""
    private.write(_name(next(iter(ports.values()))), json.dumps({"token": token, "ports": dict(ports)}))


def forget(ports: Mapping[str, int]) -> None:
    """It is closed; of no ports: it never was open."""
    for port in list(ports.values())[:1]:
        (private.folder() / _name(port)).unlink(missing_ok=True)


def known(port: int) -> dict[str, Any]:
    """{"token", "ports"} of the one on this port; {} where none is known."""
    return rundir.read_json(private.folder() / _name(port)) or {}


def _name(port: int) -> str:
    return f"open-{port}.json"
