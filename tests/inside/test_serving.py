"""Waiting until Triton has answered a real request. Triton is a stub."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpc.inside import service, serving
from hpc.inside.translating import Served


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


def test_an_end_during_the_first_request_is_heard() -> None:
    begun, over = threading.Event(), threading.Event()

    def answer(request: bytes) -> bytes:
        if b"/generate" in request:
            begun.set()
            over.wait(20)
        return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def check(port: int) -> None:
        asked = asyncio.Event()
        server: Any = None  # it is looked at only where the answer is late
        served = Served(name="m", target="m", max_tokens=1)
        ready = asyncio.ensure_future(serving._is_ready(server, port, served, 20, asked))
        assert await asyncio.to_thread(begun.wait, 20)
        asked.set()
        try:
            assert not await asyncio.wait_for(ready, 15)
        finally:
            over.set()

    with answering(answer) as port:
        asyncio.run(check(port))
