"""PURE: where a service answers, and what a laptop needs to reach it: the two steps, as text and as a document."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from hpc.core import endpoint as endpoints
from hpc.core.endpoint import Endpoint
from hpc.core.errors import UsageError

ONE_PORT = 9999
SEVERAL_PORTS = 18000
"""The laptop's port for the one port of a service, and for the first of several."""
_LOWEST, _HIGHEST = 1024, 49151
"""Below, a port needs rights; above, Windows keeps whole ranges for itself."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*")


@dataclass(frozen=True, kw_only=True)
class Tunnel:
    """The document `hpc.tunnel/1`: everything that a laptop needs."""

    run: str
    stage: str
    job_id: str
    attempt: int
    node: str
    ports: Mapping[str, int]
    local_ports: Mapping[str, int]
    path: str
    health: str
    token: str
    reach: str
    login_host: str
    login: str
    user: str
    """The name on the cluster's machines."""
    ready: float
    """Since when it answers, seconds since 1970."""
    ends: float | None
    """The job's time limit, seconds since 1970; None where it is not known."""
    command: str
    """For the laptop's terminal."""
    url: str
    """For the laptop's browser."""
    loopback: bool
    """It listens on its node's loopback alone."""
    targets: Mapping[str, str]
    """Port name -> HOST:PORT or a socket: what the far end of the ssh connection is to lead to."""
    relay: Mapping[str, str] | None
    """Port name -> the socket on the login node that leads to it; only where reach is relay."""

    @property
    def what(self) -> str:
        return f"{self.run}/{self.stage}"


def local_ports(ports: Mapping[str, int], first: int | None = None) -> dict[str, int]:
    """The laptop's port for each port of the service. UsageError where `first` is none that every laptop allows.

    >>> local_ports({"http": 9250}), local_ports({"http": 9000, "grpc": 9001})
    ({'http': 9999}, {'http': 18000, 'grpc': 18001})
    """
    start = first or (ONE_PORT if len(ports) == 1 else SEVERAL_PORTS)
    if not _LOWEST <= start <= _HIGHEST - len(ports) + 1:
        raise UsageError(
            f"--local-port {start}: not a port that every laptop allows",
            hint=f"{_LOWEST} to {_HIGHEST}, e.g. {ONE_PORT}",
        )
    return {name: start + place for place, name in enumerate(ports)}


def checked(option: str, name: str) -> str:
    """A login or host name that is one plain word in every shell. UsageError where it is none."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{option} {name!r} is no name", hint="letters, digits and . _ - @ +, without blanks")
    return name


def make(
    *,
    run: str,
    stage: str,
    attempt: int,
    endpoint: Endpoint,
    token: str,
    reach: str,
    host: str,
    login: str,
    user: str,
    first: int | None,
    ends: float | None,
    sockets: Mapping[str, str],
) -> Tunnel:
    """All of it, from a service that answers. `user` is the name on the cluster, `login` that of the way in."""
    local = local_ports(endpoint.ports, first)
    targets = sockets if reach == "relay" else _targets(endpoint, reach)
    return Tunnel(
        run=run,
        stage=stage,
        job_id=endpoint.job_id,
        attempt=attempt,
        node=endpoint.host,
        ports=dict(endpoint.ports),
        local_ports=local,
        path=endpoint.path,
        health=endpoint.health,
        token=token,
        reach=reach,
        login_host=host,
        login=login,
        user=user,
        ready=endpoint.ready,
        ends=ends,
        command=_command(endpoint, local, reach, host, login, user, targets),
        url=endpoints.page(endpoint, token, local[next(iter(local))]),
        loopback=endpoint.bound.startswith("127."),
        targets=dict(targets),
        relay=dict(sockets) if reach == "relay" else None,
    )


def _targets(endpoint: Endpoint, reach: str) -> dict[str, str]:
    # what listens on the loopback is named so by the machine that ssh ends on
    host = "localhost" if reach == "jump" or endpoint.bound.startswith("127.") else endpoint.host
    return {name: f"{host}:{port}" for name, port in endpoint.ports.items()}


def _command(
    endpoint: Endpoint,
    local: Mapping[str, int],
    reach: str,
    host: str,
    login: str,
    user: str,
    targets: Mapping[str, str],
) -> str:
    forwards = " ".join(f"-L localhost:{local[name]}:{target}" for name, target in targets.items())
    if reach == "jump":
        return f"ssh -N -J {login}@{host} {forwards} -l {user} {endpoint.host}"
    return f"ssh -N {forwards} {host} -l {login}"


def text(tunnel: Tunnel, now: float) -> str:
    """The two steps, in the form that users know."""
    first = next(iter(tunnel.local_ports.values()))
    other = first + 1000 if first < 40000 else first - 1000
    several = [f"{name}: localhost:{port}" for name, port in tunnel.local_ports.items()]
    lines = [
        f"{tunnel.what} is ready on {tunnel.node}:{next(iter(tunnel.ports.values()))}{_until(tunnel, now)}",
        "",
        "Step 1: in a terminal on your laptop (a second window; leave it open):",
        "",
        f"    {tunnel.command}",
        "",
        "Step 2: in your browser:",
        "",
        f"    {tunnel.url}",
        "",
        *([f"On {tunnel.node} itself: {_here(tunnel)}", ""] if tunnel.loopback and tunnel.reach == "direct" else []),
        *([f"On your laptop then: {', '.join(several)}"] if len(several) > 1 else []),
        f"A port in use on the laptop: hpc tunnel {tunnel.what} --local-port {other}",
        f'Step 1 or 2 says something: hpc tunnel {tunnel.what} --explain "what it says"',
    ]
    return "\n".join(lines) + "\n"


def _here(tunnel: Tunnel) -> str:
    local, port = (next(iter(ports.values())) for ports in (tunnel.local_ports, tunnel.ports))
    return tunnel.url.replace(f":{local}/", f":{port}/", 1)


def _until(tunnel: Tunnel, now: float) -> str:
    if tunnel.ends is None:
        return ""
    minutes = max(0, int(tunnel.ends - now) // 60)
    left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    return f", until {time.strftime('%a %H:%M', time.localtime(tunnel.ends))} (in {left})"
