"""Where a served model is asked from here: straight, through a step in its job, or by the address of an open tunnel."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hpc.core.errors import NotReady, UsageError
from hpc.core.rundir import StageDir
from hpc.login import opened

if TYPE_CHECKING:
    from hpc.login.tunnel import Way

_CONNECT_S = 10.0
_SILENT_S = 900.0
"""So long may nothing come of an answer: a long queue before the model."""
_HERE = ("127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Doorway:
    """One door, and the token that opens it."""

    what: str
    """RUN/STAGE, or its URL: for messages."""
    address: tuple[str, int] | str
    """Of HTTP: host and port, or a socket's path."""
    grpc: str
    """Of gRPC, as its library writes addresses; empty: it has none."""
    token: str
    tls: bool = False
    folder: StageDir | None = None
    """Of the service, where it is a run's."""

    @property
    def host(self) -> str:
        return "localhost" if isinstance(self.address, str) else self.address[0]

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}

    def connect(self) -> socket.socket:
        """A connection; NotReady where there is none to be had."""
        try:
            if isinstance(self.address, str):
                connection = socket.socket(socket.AF_UNIX)
                connection.settimeout(_CONNECT_S)
                connection.connect(self.address)
            else:
                connection = socket.create_connection(self.address, _CONNECT_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                connection = ssl.create_default_context().wrap_socket(connection, server_hostname=self.host)
        except OSError as error:
            raise self.silent(error) from None
        connection.settimeout(_SILENT_S)
        return connection

    def silent(self, error: Exception) -> NotReady:
        """Nothing answers there."""
        said = (getattr(error, "strerror", "") or str(error) or "no answer in time").lower()
        return NotReady(
            f"{self.what} does not answer: {said}", hint="is the tunnel open, and the service ready? hpc tunnel"
        )


def of_service(way: Way, *, wait: bool) -> Doorway:
    """The door of a run's service. NotReady, with the phase it is in, where it does not answer (yet)."""
    from hpc.login import forward, ready

    service, folder = way.service, way.service.run.stage(way.service.stage)
    with ready.line(sys.stderr) as say:
        endpoint, token = ready.until_ready(service, way.ask, say, wait=wait)
    if way.reach(endpoint) == "direct":
        host = endpoint.bound if endpoint.bound.startswith("127.") else endpoint.host
        grpc = f"{host}:{endpoint.ports['grpc']}" if "grpc" in endpoint.ports else ""
        return Doorway(what=service.what, address=(host, endpoint.port), grpc=grpc, token=token, folder=folder)
    line = way.line(endpoint)
    forward.ensure(line)  # it ends with the job
    grpc = f"unix:{line.sockets['grpc']}" if "grpc" in line.sockets else ""
    address = next(iter(line.sockets.values()))
    return Doorway(what=service.what, address=address, grpc=grpc, token=token, folder=folder)


def of_url(url: str, token_file: str | None, env: Mapping[str, str]) -> Doorway:
    """The door behind an address, e.g. of an open tunnel; `hpc tunnel --via` on this machine has noted its token."""
    wrong = UsageError(f"--url {url!r} is no address", hint="write e.g. --url http://localhost:9999")
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
        name = (parts.hostname or "").encode("idna").decode()
        if "[" in parts.netloc:  # Python 3.10 takes anything for an address
            ip_address(name)
    except ValueError:  # half a bracket, a port that is none, a label that is empty or too long
        raise wrong from None
    if parts.scheme not in ("http", "https") or not name or " " in name or not name.isprintable():
        raise wrong
    if parts.query or parts.username:
        raise UsageError(
            "--url holds a token, which others may see in the list of processes", hint="leave it out: --token-file FILE"
        )
    # by number: a tunnel listens there, and on a machine with other users ::1 may be one of theirs
    host = "127.0.0.1" if name == "localhost" else name
    noted = opened.known(port) if host in _HERE else {}
    if token_file is not None:
        token = _token(token_file)
    elif env.get("HPC_TOKEN"):
        token = _word(env["HPC_TOKEN"], "HPC_TOKEN")
    else:
        token = str(noted.get("token", ""))
    if not token:
        raise UsageError(
            f"there is no token for {url}", hint="--token-file FILE, or HPC_TOKEN: `hpc tunnel` shows it in its address"
        )
    grpc_port = noted.get("ports", {}).get("grpc", port)
    return Doorway(
        what=f"{parts.scheme}://{parts.hostname}:{port}", address=(host, port), token=token,
        grpc=f"{host}:{grpc_port}", tls=parts.scheme == "https",
    )  # fmt: skip


def _token(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"there is no token file '{name}'", hint="it holds the token and nothing else, with mode 0600")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"others may read {name}", hint=f"chmod 600 {name}")
    return _word(path.read_text(encoding="utf-8", errors="replace"), name)


def _word(text: str, origin: str) -> str:
    """The token that a text is. Never told: what is wrong with it may be one letter."""
    token = text.strip()
    if not token.isascii() or len(token.split()) != 1:
        raise UsageError(
            f"{origin} holds no token", hint="the text after token= in the address that `hpc tunnel` shows"
        )
    return token


def of_options(run: str | None, url: str | None, token_file: str | None, *, wait: bool) -> Doorway:
    """The door that the command line means: a run's, or the one at --url."""
    from hpc.login import targets

    if url is not None:
        if run:
            raise UsageError("--url and a run are two doors", hint="name one of them")
        return of_url(url, token_file, os.environ)
    if token_file is not None:
        raise UsageError("--token-file goes with --url", hint="a run's token is found by itself")
    return of_service(targets.way(run, models=True), wait=wait)
