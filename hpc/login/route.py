"""How a laptop gets to a service: from the login node's answer to the ports that ssh forwards. Pure but for is_free."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpc.core.errors import RuntimeUnavailable

SCHEMA = "hpc.tunnel/1"
_LAST_PORT = 65535


@dataclass(frozen=True)
class Service:
    """A service that answers, as `hpc tunnel --json` on the login node describes it."""

    document: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.document['run']}/{self.document['stage']}"

    @property
    def ports(self) -> Mapping[str, int]:
        ports: Mapping[str, int] = self.document["ports"]
        return ports

    @property
    def token(self) -> str:
        return str(self.document["token"])

    @property
    def node(self) -> str:
        return str(self.document["node"])

    @property
    def address(self) -> str:
        return f"{self.node}:{next(iter(self.ports.values()))}"

    def forwards(self, local: Mapping[str, int]) -> list[str]:
        """One `-L` for each port.

        On the loopback alone, and by number: where `localhost` is ::1 too, ssh is content with one of the two, and
        leaves the other to whoever has it.
        """
        return [f"127.0.0.1:{local[name]}:{target}" for name, target in self.document["targets"].items()]

    def url(self, local: Mapping[str, int]) -> str:
        """The page's address for the browser, with its token."""
        path = str(self.document["path"])
        return f"{self.base(local)}{path}{'&' if '?' in path else '?'}token={self.token}"

    def base(self, local: Mapping[str, int]) -> str:
        return f"http://localhost:{local[next(iter(self.ports))]}"

    def told(self, local: Mapping[str, int]) -> dict[str, Any]:
        """The document, with the ports that were really used."""
        return {**self.document, "local_ports": dict(local), "url": self.url(local)}


def service(document: Any, host: str) -> Service:
    """Read the login node's answer. RuntimeUnavailable where it is none."""
    needed = {"run", "stage", "node", "ports", "local_ports", "path", "health", "token", "reach", "targets", "user"}
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or needed - document.keys():
        raise RuntimeUnavailable(
            f"hpc on {host} gave an answer that this hpc does not understand",
            hint="install the same version on both: pip install --upgrade hpc-batch",
        )
    return Service({name: value for name, value in document.items() if name != "schema"})


def choose(wishes: Mapping[str, int], free: Callable[[int], bool]) -> dict[str, int]:
    """A free local port for each name: the one wished for, else the next free one after it.

    >>> choose({"http": 8000, "grpc": 8001}, lambda port: port not in (8000, 8002))
    {'http': 8001, 'grpc': 8003}
    """
    chosen: dict[str, int] = {}
    for name, wish in wishes.items():
        ports: Iterable[int] = range(max(wish, 1), _LAST_PORT + 1)
        found = next((p for p in ports if p not in chosen.values() and free(p)), None)
        if found is None:
            raise RuntimeUnavailable(f"no local port from {wish} on is free", hint="choose a lower --local-port")
        chosen[name] = found
    return chosen


def is_free(port: int) -> bool:
    """True where nothing listens on this port of the laptop's loopback, and we may."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                if probe.connect_ex((address, port)) == 0:  # macOS: binding may succeed beside one on all addresses
                    return False
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET or error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False  # else: a machine without IPv6
    return True
