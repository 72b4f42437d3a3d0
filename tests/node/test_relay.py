"""Bytes come out as they went in, both ways and on many connections; half-closed, refused and broken ones end so."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hpc.node import relay

CHECKOUT = Path(relay.__file__).resolve().parents[2]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def relayed(handler: Handler, *, allow: bool = True) -> AsyncIterator[Callable[[], Awaitable[relay.Ends]]]:
    """A server on the loopback, the relay to it as a process of its own, and what opens a connection through it."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hpc.node.relay", str(port if allow else 1), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, limit=relay.WINDOW,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    link = relay.Link(process.stdout, process.stdin)
    assert (await link.receive())[1] == relay.HELLO
    serving = asyncio.ensure_future(link.serve())

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await link.carry((reader, writer), port)

    front = await asyncio.start_server(take, "127.0.0.1", 0)

    async def connect() -> relay.Ends:
        return await asyncio.open_connection("127.0.0.1", front.sockets[0].getsockname()[1])

    try:
        yield connect
    finally:
        front.close()
        server.close()
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 10) == 0
        await asyncio.wait_for(serving, 10)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def through(ends: relay.Ends, data: bytes) -> bytes:
    """What comes back for these bytes, the sending side closed after them."""
    reader, writer = ends

    async def feed() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    _, back = await asyncio.gather(feed(), reader.read())
    writer.close()
    return back


def run(what: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(what, 60))


@pytest.mark.parametrize("size", [0, 1, 65536, relay.WINDOW, 20_000_001])
def test_bytes_are_unchanged_both_ways(size: int) -> None:
    async def check() -> None:
        async with relayed(echo) as connect:
            data = os.urandom(size)
            assert await through(await connect(), data) == data

    run(check())


def test_many_connections_at_once_do_not_mix() -> None:
    async def check() -> None:
        async with relayed(echo) as connect:
            sent = [bytes([n]) * 300_000 + os.urandom(n) for n in range(40)]
            back = await asyncio.gather(*[through(await connect(), data) for data in sent])
            assert [hashlib.sha256(b).digest() for b in back] == [hashlib.sha256(s).digest() for s in sent]

    run(check())


def test_one_that_does_not_read_holds_up_no_other() -> None:
    async def check() -> None:
        async with relayed(echo) as connect:
            _, stuck = await connect()
            stuck.write(os.urandom(30 * relay.WINDOW))  # more than fits into all buffers on the way
            await asyncio.sleep(0.5)
            data = os.urandom(5_000_000)
            assert await through(await connect(), data) == data
            stuck.transport.abort()

    run(check())


def test_server_that_ends_first_is_seen() -> None:
    async def goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.close()

    async def check() -> None:
        async with relayed(goodbye) as connect:
            reader, writer = await connect()
            assert await reader.read() == b"bye"
            writer.close()

    run(check())


def test_server_that_speaks_first_is_heard_while_the_link_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async def full(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)

    async def check() -> None:
        async with relayed(greet) as connect:
            monkeypatch.setattr(asyncio.StreamWriter, "drain", full)
            reader, writer = await connect()
            assert await asyncio.wait_for(reader.read(), 5) == b"hello"
            writer.close()

    run(check())


def test_client_that_breaks_off_is_seen_by_the_server() -> None:
    async def check() -> None:
        gone = asyncio.Event()

        async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            gone.set()
            writer.close()

        async with relayed(wait) as connect:
            _, writer = await connect()
            writer.write(b"x")
            await writer.drain()
            writer.transport.abort()
            await asyncio.wait_for(gone.wait(), 10)

    run(check())


def test_port_that_was_not_named_is_refused() -> None:
    async def check() -> None:
        async with relayed(echo, allow=False) as connect:
            assert await through_or_reset(await connect()) == b""

    run(check())


async def through_or_reset(ends: relay.Ends) -> bytes:
    try:
        return await through(ends, b"x")
    except ConnectionError:
        return b""
