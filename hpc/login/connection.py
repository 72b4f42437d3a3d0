"""HTTP over a socket that somebody else opens: of the network, of a relay, of a tunnel."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable


class Connection(http.client.HTTPConnection):
    """One connection; `host` is only told to the server."""

    def __init__(self, open_: Callable[[], socket.socket], host: str = "localhost") -> None:
        super().__init__(f"[{host}]" if ":" in host else host)  # else what follows IPv6's last colon is a port to it
        self._open = open_

    def connect(self) -> None:
        self.sock = self._open()
