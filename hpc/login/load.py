"""Load on a door: so many requests at all times (closed loop), or at random times of a given rate (open loop)."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hpc.login.doorway import Doorway
from hpc.login.question import Question, openai
from hpc.login.stream import Sample, Stream

Progress = Callable[[int, int], None]
_ANSWER_S = 900.0
"""So long may one answer take."""


@dataclass(frozen=True)
class Level:
    """One load. Exactly one of the first two is given, and of the last two."""

    concurrency: int | None = None
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None

    @property
    def name(self) -> str:
        return f"c={self.concurrency}" if self.concurrency else f"{self.rate:g}/s"


def requests_of(door: Doorway, questions: Sequence[Question]) -> list[bytes]:
    """Each question as the bytes that are sent."""
    found = []
    for question in questions:
        path, words = openai(question)
        body = json.dumps(words).encode()
        head = [f"POST {path} HTTP/1.1", f"Host: {door.host}", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in door.headers().items()]
        found.append("\r\n".join([*head, "", ""]).encode() + body)
    return found


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds since the beginning at which requests come: a Poisson process."""
    source, at = random.Random(seed), 0.0
    while True:
        yield at
        at += source.expovariate(rate)


def run(door: Doorway, requests: Sequence[bytes], level: Level, *, seed: int, progress: Progress) -> list[Sample]:
    """All requests of one level, each with what came of it."""
    gc.collect()
    gc.disable()  # a collection in the middle would be taken for the service's time
    try:
        return asyncio.run(_Load(door, requests, level, progress).run(seed))
    finally:
        gc.enable()


class _Load:
    def __init__(self, door: Doorway, requests: Sequence[bytes], level: Level, progress: Progress) -> None:
        self._door, self._requests, self._level, self._progress = door, requests, level, progress
        self._idle: list[Stream] = []
        self._samples: list[Sample] = []
        self._done = 0
        self._until = float("inf")

    async def run(self, seed: int) -> list[Sample]:
        level = self._level
        if level.duration is not None:
            self._until = time.perf_counter() + level.duration
        ticker = asyncio.ensure_future(self._tick())
        try:
            if level.concurrency is not None:
                await asyncio.gather(*(self._worker() for _ in range(level.concurrency)))
            else:
                await self._openly(level.rate or 1.0, seed)
        finally:
            ticker.cancel()
            for stream in self._idle:
                stream.close()
        return self._samples

    async def _tick(self) -> None:
        while True:
            self._progress(self._done, len(self._samples))
            await asyncio.sleep(0.5)

    def _next(self) -> Sample | None:
        number = len(self._samples)
        if time.perf_counter() >= self._until or number >= (self._level.requests or float("inf")):
            return None
        self._samples.append(Sample(number % len(self._requests)))
        return self._samples[-1]

    async def _worker(self) -> None:
        while (sample := self._next()) is not None:
            await self._one(sample)
            if sample.error and not sample.times:
                await asyncio.sleep(0.05)  # refused at once: do not ask a thousand times a second

    async def _openly(self, rate: float, seed: int) -> None:
        begin, running = time.perf_counter(), set()
        for at in arrivals(rate, seed):
            wait = begin + at - time.perf_counter()
            if begin + at >= self._until:
                break
            if wait > 0:
                await asyncio.sleep(wait)
            sample = self._next()
            if sample is None:
                break
            sample.late = max(0.0, time.perf_counter() - begin - at)
            running.add(asyncio.ensure_future(self._one(sample)))
        await asyncio.gather(*running)

    async def _one(self, sample: Sample) -> None:
        request = self._requests[sample.prompt]
        try:
            while True:
                used = bool(self._idle)
                stream = self._idle.pop() if used else await self._connect()
                answered = await asyncio.wait_for(stream.ask(request, sample), _ANSWER_S)
                if answered or not used:  # one that lay idle may have been closed meanwhile: another one then
                    break
            if not answered:
                sample.error = "the connection was closed without an answer"
            if answered and stream.open:
                self._idle.append(stream)
            else:
                stream.close()
        except asyncio.TimeoutError:
            stream.close()
            sample.error = f"no end within {_ANSWER_S:g} s"
        except OSError as error:
            sample.error = (error.strerror or str(error) or "no connection").lower()
        if sample.error:
            sample.began = sample.began or time.perf_counter()
            sample.ended = sample.ended or time.perf_counter()
        self._done += 1

    async def _connect(self) -> Stream:
        loop, address = asyncio.get_running_loop(), self._door.address
        if isinstance(address, str):
            _, stream = await loop.create_unix_connection(Stream, address)
            return stream
        context = ssl.create_default_context() if self._door.tls else None
        _, stream = await loop.create_connection(Stream, address[0], address[1], ssl=context)
        return stream


def warm_up(door: Doorway, requests: Sequence[bytes], number: int) -> list[Sample]:
    """Some requests, one after the other, that nobody counts."""
    if not number:
        return []
    return run(door, requests, Level(concurrency=1, requests=number), seed=0, progress=lambda done, begun: None)
