"""Bytes between a socket that listens and a Unix socket, for a server that can't be given an open socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket

_PIECE = 1 << 16


async def lead(listening: socket.socket, path: str) -> asyncio.AbstractServer:
    """From now on every connection to the one is a connection to the other."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_unix_connection(path, limit=_PIECE)
        except OSError:  # it ends at this moment
            writer.transport.abort()
            return
        await asyncio.gather(_pass(reader, there[1]), _pass(there[0], writer))

    return await asyncio.start_server(take, sock=listening, limit=_PIECE)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One way, to its end; where it breaks, the other way breaks too."""
    try:
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
    except OSError:
        writer.transport.abort()
        return
    with contextlib.suppress(OSError):
        writer.write_eof()
