"""Where a running service answers: written by the service once it does, read by `hpc status` and `hpc tunnel`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpc.core import rundir
from hpc.core.errors import UsageError
from hpc.core.rundir import StageDir

_SCHEMA = "hpc.endpoint/1"
FIRST_PORT, LAST_PORT = 9000, 9999
"""Ports that are chosen from: high enough for everybody, below those that the kernel gives to clients."""
HANDED = "HPC_LISTENING_SOCKETS"
"""The variable with the numbers of the open sockets that a private service answers on: `http=5 grpc=6`."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One service that has answered."""

    host: str
    """The node's name, as Slurm has it."""
    bound: str
    """The address that it listens on: 0.0.0.0 where other nodes reach it, else 127.0.0.1."""
    ports: Mapping[str, int]
    """Name -> port; the first one is what a person opens: {"http": 9250, "grpc": 9251}."""
    path: str
    """Of the page that a person opens, e.g. /lab."""
    health: str
    """A path that answers 200 to a request with the token, and to no other."""
    job_id: str
    pid: int
    ready: float
    """When it first answered, seconds since 1970."""

    @property
    def port(self) -> int:
        return next(iter(self.ports.values()))

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def handed(environment: Mapping[str, str]) -> dict[str, int]:
    """Port name -> the number of its open socket, as the service was given them; nothing where it was given none.

    >>> handed({HANDED: "http=5 grpc=6"}), handed({})
    ({'http': 5, 'grpc': 6}, {})
    """
    pairs = (word.split("=") for word in environment.get(HANDED, "").split())
    return {name: int(number) for name, number in pairs}


def handing(sockets: Mapping[str, int]) -> dict[str, str]:
    """The variable that tells a service of its open sockets, as `handed` reads it.

    >>> handing({"http": 5, "grpc": 6}), handing({})
    ({'HPC_LISTENING_SOCKETS': 'http=5 grpc=6'}, {})
    """
    return {HANDED: " ".join(f"{name}={number}" for name, number in sockets.items())} if sockets else {}


def refuse(name: str, wish: int) -> None:
    """UsageError for a port that no service of a user's can have; 0 is any."""
    if wish and not 1024 <= wish <= 65535:
        raise UsageError(f"{name} = {wish} is no port", hint="0 for any that is free, or one from 1024 to 65535")


def page(endpoint: Endpoint, token: str, port: int) -> str:
    """The address for the browser of a laptop where `port` leads to the service."""
    mark = "&" if "?" in endpoint.path else "?"
    return f"http://localhost:{port}{endpoint.path}{mark}token={token}"


def write(folder: StageDir, endpoint: Endpoint, token: str) -> None:
    """Announce it. The token goes into a file of its own that nobody else can read, and is there first."""
    rundir.write_text(folder.token, token, mode=0o600)
    rundir.write_json(folder.endpoint, {"schema": _SCHEMA, **asdict(endpoint)})


def read(folder: StageDir) -> Endpoint | None:
    """The service of this stage, or None where none has answered."""
    document: dict[str, Any] | None = rundir.read_json(folder.endpoint)
    if document is None or document.get("schema") != _SCHEMA:
        return None
    return Endpoint(**{name: value for name, value in document.items() if name != "schema"})


def clear(folder: StageDir, job_id: str | None = None, *, keep_token: bool = False) -> None:
    """Nobody is led there any more. With a job's id: unless another job has announced itself meanwhile.

    A job that may be requeued keeps its token: whoever was let in is let in again.
    """
    found = read(folder)
    if job_id is not None and found is not None and found.job_id != job_id:
        return
    folder.endpoint.unlink(missing_ok=True)
    if not keep_token:
        folder.token.unlink(missing_ok=True)


def token_of(folder: StageDir) -> str:
    """What an earlier start of the same job has left, else a new one."""
    try:
        return folder.token.read_text(encoding="utf-8") or secrets.token_urlsafe(32)
    except FileNotFoundError:
        return secrets.token_urlsafe(32)


def take_over(folder: StageDir, job_id: str) -> None:
    """The successor that has this job's id is the service's job from now on, if it is not already."""
    for attempt in folder.successors():
        if (rundir.read_json(attempt.successor) or {}).get("job_id") == job_id:
            attempt.successor.replace(folder.job)


def promote(folder: StageDir, after: int) -> None:
    """The job with this number has ended before its successor was ready: the next one is the service's job."""
    later = [attempt for attempt in folder.successors() if attempt.number > after]
    if later:
        later[0].successor.replace(folder.job)
