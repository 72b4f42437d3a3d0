"""What a private service is given: open sockets in front of its empty network.

A socket stays in the network that it was made in. So the service, which sees nothing but its own loopback, answers on
ports of the node, and nothing that it starts beside can be reached by anybody. See docs/adr/0015.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator, Mapping, Sequence

from hpc.core.endpoint import FIRST_PORT, LAST_PORT
from hpc.core.errors import HpcError

_BACKLOG = 128


@contextlib.contextmanager
def sockets_for(address: str, names: Sequence[str]) -> Iterator[Mapping[str, int]]:
    """Port name -> the number of a socket that listens there; nothing where no address is given."""
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(socket.socket()) for name in (names if address else ())}
        for listening in opened.values():
            _bind(listening, address)
            listening.listen(_BACKLOG)
        yield {name: listening.fileno() for name, listening in opened.items()}


def _bind(listening: socket.socket, address: str) -> None:
    for port in random.sample(range(FIRST_PORT, LAST_PORT + 1), LAST_PORT - FIRST_PORT + 1):
        with contextlib.suppress(OSError):
            listening.bind((address, port))
            return
    raise HpcError(f"all ports from {FIRST_PORT} to {LAST_PORT} are taken on this node", hint="submit again elsewhere")
