"""Waiting until Triton has answered a real request. Triton is a stub."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpc.inside import service, serving


@contextmanager
def answering(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """The port of a server that answers so to the first bytes of each connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(answer(self.request.recv(65536)))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_what_is_no_http_is_no_answer() -> None:
    with answering(lambda _: b"SSH-2.0-x\r\n") as port:
        url = f"http://127.0.0.1:{port}/"
        assert not service.answers(url, "token")
        assert not serving._get(url)
        assert serving._post(url, {}) == "SSH-2.0-x\r\n"
