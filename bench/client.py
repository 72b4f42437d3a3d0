"""What `hpc bench`'s own client costs and adds: 64 streams of a server that sends by the clock, in another process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Fact, Line, Pair, Part

from hpc.login import doorway, figures, load, prompts
from hpc.login.doorway import Doorway
from hpc.login.load import Level
from hpc.login.question import Sampling
from hpc.login.stream import Sample

ROUNDS = 5
STREAMS, TOKENS, EVERY_S = 64, 100, 0.02
LATE_MS, CPU_US = 2.0, 150.0
_STUB = Path(__file__).resolve().parent.parent / "tests" / "support" / "door.py"


def lines(rounds: int) -> Iterator[Line]:
    with _server(EVERY_S) as door:
        _load(door)
        samples, cpu_s = _load(door)
    ones = [figures.of_one(sample)["itl"] for sample in samples]
    off = figures.percentile([abs(itl - EVERY_S * 1000) for itl in ones], 99)
    # both processes read the same clock: each token is the time when it was sent
    late = [(at - float(said)) * 1000 for s in samples for at, said in zip(s.times, s.pieces, strict=True)]
    yield _fact(f"{STREAMS} streams, {STREAMS / EVERY_S:.0f} tokens/s: a token is timed late by (median)",
                figures.percentile(late, 50), LATE_MS, "ms")  # fmt: skip
    yield Part(what="late by (p99)", ms=[figures.percentile(late, 99)])
    yield _fact("– the time between tokens is off by (p99)", off, LATE_MS, "ms")
    yield _fact("– CPU time for each token", cpu_s * 1e6 / (STREAMS * TOKENS), CPU_US, "µs")
    with _server(0) as door:
        ours, bare = [], []
        for number in range(rounds + 1):
            pair = _timed(lambda: _load(door)), _timed(lambda: asyncio.run(_bare(door)))
            if number:
                ours.append(pair[0])
                bare.append(pair[1])
    yield Pair(
        what=f"{STREAMS * TOKENS} tokens on {STREAMS} streams, as fast as they come", ms=ours,
        against="a client that reads the bytes, and no more", against_ms=bare,
    )  # fmt: skip


def _fact(what: str, found: float, goal: float, unit: str) -> Fact:
    return Fact(what=what, found=f"{found:.2f} {unit}", goal=f"≤ {goal:g} {unit}", met=found <= goal)


@contextmanager
def _server(every_s: float) -> Iterator[Doorway]:
    """The stub of the door, as a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".token") as token:
        token.write("token")
        token.flush()
        argv = [sys.executable, str(_STUB), token.name, str(every_s), str(TOKENS)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield doorway.of_url(f"http://127.0.0.1:{process.stdout.readline().strip()}", token.name, {})
            finally:
                process.terminate()


def _load(door: Doorway) -> tuple[list[Sample], float]:
    """The samples, and the CPU time that they took here."""
    requests = load.requests_of(door, prompts.questions(None, Sampling(max_tokens=TOKENS), raw=False))
    begin = time.process_time()
    level = Level(concurrency=STREAMS, requests=STREAMS)
    samples = load.run(door, requests, level, seed=0, progress=lambda done, begun: None)
    taken = time.process_time() - begin
    assert not [s.error for s in samples if s.error]
    return samples, taken


async def _bare(door: Doorway) -> None:
    (request, *_) = load.requests_of(door, prompts.questions(None, Sampling(max_tokens=TOKENS), raw=False))
    assert not isinstance(door.address, str)
    host, port = door.address

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request)
        rest = b""
        while b"[DONE]" not in rest:
            rest = rest[-8:] + await reader.read(1 << 16)
        writer.close()

    await asyncio.gather(*(one() for _ in range(STREAMS)))


def _timed(work: object) -> float:
    assert callable(work)
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1000
