"""A stub of a served model's door: real HTTP on this machine's loopback, speaking its protocol, without a model.

What it says, how it is cut into chunks and how fast it comes is set by the test; each answer can be an error, too.
As a program: door.py TOKEN_FILE SECONDS_PER_TOKEN TOKENS; prints its port. Each token is the time when it was sent.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "a-token-of-the-stub"


def chunk(text: str | None = None, *, reason: str | None = None, usage: dict[str, int] | None = None) -> str:
    """One event of a chat's stream, as the door writes it."""
    choices = [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}]
    words: dict[str, Any] = {"object": "chat.completion.chunk", "choices": [] if usage else choices}
    return json.dumps({**words, **({"usage": usage} if usage else {})}, ensure_ascii=False)


def stream(pieces: Sequence[str], reason: str = "stop", prompt: int = 5) -> list[str]:
    """All events of a whole answer."""
    usage = {"prompt_tokens": prompt, "completion_tokens": len(pieces), "total_tokens": prompt + len(pieces)}
    return [*map(chunk, pieces), chunk(reason=reason), chunk(usage=usage), "[DONE]"]


@dataclass
class Reply:
    """What is answered next."""

    events: Sequence[str] = ()
    body: dict[str, Any] | None = None
    """In place of a stream."""
    status: int = 200
    split: int = 0
    """Bytes of each chunk of HTTP, whatever stands in them; 0: an event each."""
    cut_after: int | None = None
    """Close the connection after so many events."""
    delay: float = 0.0
    """Seconds before each event."""
    stamp: bool = False
    """Put the clock's time, at which it is sent, in the place of @ in each event."""
    close: bool = False
    """Close the connection after the whole answer, without having said so."""
    together: int = 0
    """Say nothing before so many requests have been asked, all in all."""


@dataclass
class Stub:
    """`reply` is called with each request's path and body."""

    reply: Callable[[str, dict[str, Any]], Reply]
    port: int = 0
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    gone: int = 0
    """Clients that left in the middle of an answer."""

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    async def serve(self) -> asyncio.AbstractServer:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        fields = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        body = json.loads(await reader.readexactly(int(fields.get("content-length", 0))) or b"{}")
        path = first.split()[1]
        if fields.get("authorization") != f"Bearer {TOKEN}":
            reply = Reply(status=401, body={"error": {"message": "this service asks for its token"}})
        elif path == "/v1/models":
            reply = Reply(body={"object": "list", "data": [{"id": "stub", "chat": True}]})
        else:
            self.asked.append((path, body))
            reply = self.reply(path, body)
        while len(self.asked) < reply.together:
            await asyncio.sleep(0.005)
        try:
            return await _write(writer, reply)
        except ConnectionError:
            self.gone += 1
            return False


async def _write(writer: asyncio.StreamWriter, reply: Reply) -> bool:
    if reply.body is not None:
        body = json.dumps(reply.body, ensure_ascii=False).encode()
        head = f"HTTP/1.1 {reply.status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return True
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    texts = [f"data: {event}\n\n".encode() for event in reply.events[: reply.cut_after]]
    if reply.split:
        whole = b"".join(texts)
        texts = [whole[n : n + reply.split] for n in range(0, len(whole), reply.split)]
    begin, loop = asyncio.get_running_loop().time(), asyncio.get_running_loop()
    for number, event in enumerate(texts, 1):
        text = event
        if reply.delay:  # by the clock: a late one does not make the next ones late
            await asyncio.sleep(max(0.0, begin + number * reply.delay - loop.time()))
        elif reply.split:
            await asyncio.sleep(0)
        if writer.is_closing():
            raise ConnectionResetError
        if reply.stamp:
            text = text.replace(b"@", b"%.6f" % time.perf_counter())
        writer.write(b"%x\r\n%s\r\n" % (len(text), text))
        await writer.drain()
    if reply.cut_after is not None:
        return False
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return not reply.close


@contextmanager
def opened(reply: Callable[[str, dict[str, Any]], Reply]) -> Iterator[Stub]:
    """A stub that answers while the block runs."""
    stub, begun = Stub(reply), threading.Event()
    ends: list[Callable[[], object]] = []

    async def work() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        ends.append(lambda: loop.call_soon_threadsafe(over.set))
        server = await stub.serve()
        begun.set()
        await over.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
    thread.start()
    assert begun.wait(10)
    try:
        yield stub
    finally:
        ends[0]()
        thread.join(10)


async def _program(seconds: float, tokens: int) -> None:
    events = stream(["@ "] * tokens, reason="length")
    stub = Stub(lambda path, body: Reply(events, delay=seconds, stamp=True))
    server = await stub.serve()
    print(stub.port, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    TOKEN = Path(sys.argv[1]).read_text().strip()
    asyncio.run(_program(float(sys.argv[2]), int(sys.argv[3])))
