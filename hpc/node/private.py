"""What a private service is given: an open socket in front of its empty network.

A socket stays in the network that it was made in. So the service, which sees nothing but its own loopback, answers on
a port of the node, and nothing that it starts beside can be reached by anybody. See docs/adr/0015.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator, Mapping

from hpc.core.endpoint import FIRST_PORT, HANDED, LAST_PORT
from hpc.core.errors import HpcError

_BACKLOG = 128


@contextlib.contextmanager
def socket_for(address: str) -> Iterator[tuple[int, ...]]:
    """The number of a socket that listens there, as pass_fds takes it; nothing where no address is given."""
    if not address:
        yield ()
        return
    with socket.socket() as listening:
        _bind(listening, address)
        listening.listen(_BACKLOG)
        yield (listening.fileno(),)


def _bind(listening: socket.socket, address: str) -> None:
    for port in random.sample(range(FIRST_PORT, LAST_PORT + 1), LAST_PORT - FIRST_PORT + 1):
        with contextlib.suppress(OSError):
            listening.bind((address, port))
            return
    raise HpcError(f"all ports from {FIRST_PORT} to {LAST_PORT} are taken on this node", hint="submit again elsewhere")


def handed(sockets: tuple[int, ...]) -> Mapping[str, str]:
    """The variable that tells the service of it."""
    return {HANDED: str(sockets[0])} if sockets else {}
