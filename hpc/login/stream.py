"""One HTTP connection of the load: a request, and when each piece of its streamed answer came. Made to cost little."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

from hpc.login import question as words
from hpc.login.sse import Events


@dataclass
class Sample:
    """One request. Times are time.perf_counter()'s."""

    prompt: int
    """The number of its question."""
    late: float = 0.0
    """Seconds that the client itself was late with it, in an open loop."""
    began: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each piece with text came."""
    ended: float = 0.0
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    reason: str = ""
    tokens: int | None = None
    prompt_tokens: int | None = None
    error: str = ""


class Stream(asyncio.Protocol):
    """A connection that is used again and again; `ask` one after the other."""

    def __init__(self) -> None:
        self.open = True
        self._transport: asyncio.Transport | None = None
        self._sample = Sample(0)
        self._done: asyncio.Future[bool] | None = None
        self._clear()

    def _clear(self) -> None:
        self._rest = b""
        self._status = 0
        self._left: int | None = None
        """Bytes of this chunk, or of the body, still to come; None: its size is yet to be read."""
        self._chunked = self._streams = False
        self._body: list[bytes] = []
        self._events = Events()

    async def ask(self, request: bytes, sample: Sample) -> bool:
        """Send it and fill the sample; False where the connection had been closed before, and nothing came."""
        if not self.open or self._transport is None:
            return False
        self._clear()
        self._sample, self._done = sample, asyncio.get_running_loop().create_future()
        sample.began = time.perf_counter()
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._done = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, failure: Exception | None) -> None:
        self.open = False
        if self._done is None:
            return
        begun = self._status != 0 or bool(self._rest)
        if begun:
            self._sample.error = self._sample.error or "cut off in the middle of the answer"
        self._finish(begun)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self._rest + data if self._rest else data
        self._rest = b""
        if not self._status:
            head, mark, data_after = data.partition(b"\r\n\r\n")
            if not mark:
                self._rest = data
                return
            self._head(head.decode("latin-1"))
            data = data_after
        if self._chunked:
            self._chunks(data, now)
        else:
            self._plain(data, now)

    # ---- reading

    def _head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._status = int(first.split(" ", 2)[1]) if first.startswith("HTTP/1.") else 502
        self._chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        self._streams = self._status == 200 and fields.get("content-type", "").startswith("text/event-stream")
        self._left = None if self._chunked else int(fields.get("content-length") or 0)
        if fields.get("connection", "").lower() == "close":
            self.open = False

    def _plain(self, data: bytes, now: float) -> None:
        self._take(data, now)
        self._left = (self._left or 0) - len(data)
        if self._left <= 0:
            self._end(now)

    def _chunks(self, data: bytes, now: float) -> None:
        place = 0
        while True:
            if self._left is None:
                line = data.find(b"\r\n", place)
                if line < 0:
                    break
                self._left = int(data[place:line].partition(b";")[0], 16) + 2  # and the line's end after it
                place = line + 2
                if self._left == 2:  # the last one: an empty line ends it
                    self._left = -1
            if self._left == -1:
                line = data.find(b"\r\n", place)
                if line >= 0:
                    self._end(now)
                    return
                break
            if len(data) - place < self._left:
                break
            self._take(data[place : place + self._left - 2], now)
            place += self._left
            self._left = None
        self._rest = data[place:]

    def _take(self, data: bytes, now: float) -> None:
        if not self._streams:
            self._body.append(data)
            return
        for text in self._events.feed(data):
            self._event(text, now)

    def _event(self, text: str, now: float) -> None:
        if text == "[DONE]":
            return
        try:
            event = json.loads(text)
        except ValueError:
            self._sample.error = "an event that is no JSON"
            return
        said = words.error_in(event)
        if said is not None:
            self._sample.error = said
            return
        piece = words.openai_piece(event)
        sample = self._sample
        if piece.text:
            sample.times.append(now)
            sample.pieces.append(piece.text)
        sample.reason = piece.reason or sample.reason
        if piece.tokens is not None:
            sample.tokens, sample.prompt_tokens = piece.tokens, piece.prompt

    def _end(self, now: float) -> None:
        if not self._streams:
            body = b"".join(self._body)
            if self._status == 200 and words.error_in(_json(body)) is None:
                self._event(body.decode("utf-8", "replace"), now)
            else:
                self._sample.error = f"{self._status}: {words.error_in(_json(body)) or 'no answer'}"
        self._sample.ended = now
        self._finish(True)

    def _finish(self, answered: bool) -> None:
        sample = self._sample
        sample.text = "".join(sample.pieces)
        sample.ended = sample.ended or time.perf_counter()
        if answered and not sample.error and not (sample.reason and sample.text):
            sample.error = "no text in the answer" if sample.reason else "an answer without its end"
        if self._done is not None and not self._done.done():
            self._done.set_result(answered)


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return None
