"""Bytes between a node's loopback and the login node, over the two pipes of one step: many connections, nothing else.

On the node: `python3 -m hpc.node.relay PORT…` answers on stdin and stdout; the login node's end is hpc.login.forward.
A frame is one connection's piece: its number, what it is, its length, the bytes, and a newline, since srun passes on
whole lines at once. Each side may have WINDOW bytes of a connection under way, so that a slow one holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
from collections.abc import Awaitable, Callable, Sequence

HELLO, OPEN, DATA, END, MORE, CLOSE = range(6)
"""I am here; a new connection, to port; bytes; no more bytes follow; so many have arrived; it is over."""
WINDOW = 1 << 20
_PIECE = 1 << 16
_HEAD = struct.Struct(">IBI")
NUMBER = struct.Struct(">I")

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Ends]]


class Link:
    """One end of the two pipes, with the connections that are open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._open: dict[int, tuple[_Connection, asyncio.Task[None]]] = {}
        self._last = 0

    async def send(self, number: int, kind: int, data: bytes = b"") -> None:
        self._writer.write(_HEAD.pack(number, kind, len(data)) + data + b"\n")
        async with self._turn:
            await self._writer.drain()

    async def receive(self) -> tuple[int, int, bytes]:
        """The next frame. asyncio.IncompleteReadError where the other side is gone."""
        number, kind, length = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
        data = await self._reader.readexactly(length + 1)
        return number, kind, data[:-1]

    async def carry(self, ends: Ends, port: int) -> None:
        """One connection of ours, led to that port of the other side, to its end."""

        async def connect() -> Ends:
            return ends

        self._last += 1
        number = self._last
        task = self._add(number, connect)  # before the wait: the answer may be here before there is room again
        await self.send(number, OPEN, NUMBER.pack(port))  # and it writes at once: before the task's first frame
        await asyncio.gather(task, return_exceptions=True)

    async def serve(self, ports: Sequence[int] = ()) -> None:
        """Until the other side is gone. Those ports of ours may be asked for."""
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self._take(*await self.receive(), ports)
        finally:
            tasks = [task for _, task in self._open.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, number: int, kind: int, data: bytes, ports: Sequence[int]) -> None:
        if kind == OPEN:
            (port,) = NUMBER.unpack(data)
            if port in ports:
                self._add(number, lambda: asyncio.open_connection("127.0.0.1", port))
            else:
                await self.send(number, CLOSE)
        elif number in self._open:  # else it ended while this was under way
            connection, task = self._open[number]
            if kind == CLOSE:
                task.cancel()
            else:
                connection.take(kind, data)

    def _add(self, number: int, connect: Connect) -> asyncio.Task[None]:
        connection = _Connection(self, number)
        task = asyncio.ensure_future(connection.run(connect))
        self._open[number] = (connection, task)
        task.add_done_callback(lambda _: self._open.pop(number))
        return task


class _Connection:
    """One connection: what came over the link goes to its socket, and the other way."""

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self._number = number
        self._came: asyncio.Queue[bytes] = asyncio.Queue()
        """Bytes to write; empty ones: no more follow."""
        self._room = WINDOW
        self._more = asyncio.Event()

    def take(self, kind: int, data: bytes) -> None:
        if kind == MORE:
            self._room += NUMBER.unpack(data)[0]
            self._more.set()
        else:
            self._came.put_nowait(data if kind == DATA else b"")

    async def run(self, connect: Connect) -> None:
        writer = None
        try:
            reader, writer = await connect()
            ways = [asyncio.ensure_future(self._outward(reader)), asyncio.ensure_future(self._inward(writer))]
            try:
                await asyncio.gather(*ways)
            finally:
                for way in ways:
                    way.cancel()
            writer.close()
            await writer.wait_closed()
        except OSError:  # refused, or reset: the other side learns it
            if writer is not None:
                writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await self._link.send(self._number, CLOSE)
        except asyncio.CancelledError:
            if writer is not None:
                writer.transport.abort()
            raise

    async def _outward(self, reader: asyncio.StreamReader) -> None:
        while True:
            while self._room <= 0:
                self._more.clear()
                await self._more.wait()
            data = await reader.read(min(_PIECE, self._room))
            if not data:
                await self._link.send(self._number, END)
                return
            self._room -= len(data)
            await self._link.send(self._number, DATA, data)

    async def _inward(self, writer: asyncio.StreamWriter) -> None:
        arrived = 0
        while data := await self._came.get():
            writer.write(data)
            await writer.drain()
            arrived += len(data)
            if arrived >= WINDOW // 4:  # seldom: a small frame before another costs srun's sockets 40 ms
                await self._link.send(self._number, MORE, NUMBER.pack(arrived))
                arrived = 0
        if writer.can_write_eof():
            writer.write_eof()


async def _main(ports: Sequence[int]) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=WINDOW)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), sys.stdout.buffer
    )
    link = Link(reader, asyncio.StreamWriter(transport, protocol, None, loop))
    await link.send(0, HELLO)
    await link.serve(ports)


if __name__ == "__main__":
    asyncio.run(_main([int(port) for port in sys.argv[1:]]))
