"""
The process of a serving stage: Triton, the door in front of it, and a clean end of both.

python3 -m hpc.inside.serving SETTINGS.json
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from hpc.core import endpoint as endpoints
from hpc.core.endpoint import handed
from hpc.core.errors import HpcError
from hpc.core.rundir import StageDir
from hpc.inside import figures, rpc, triton
from hpc.inside.chat import Template
from hpc.inside.door import Door
from hpc.inside.meeting import Meeting
from hpc.inside.openai import Api
from hpc.inside.translating import Served
from hpc.inside.triton import Triton

TOKEN = "HPC_DOOR_TOKEN"
_LOOK_S = 0.2
_WATCH_S = 0.5
"""Between two looks at the server: from cold caches, beside an engine that has all cores, one takes it 1 ms."""
_QUIET_S = 0.3
_LOOK_AGAIN_S = 1.0
"""Between two looks at the announcement."""
_MOVE_S = 10.0
"""So long new requests are taken after another job has taken over: clients that are led by a tunnel move in less."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that the process is told, as JSON."""

    repository: str
    stage: str
    """The stage's folder, for the announcement and the figures."""
    own: str
    """A folder for this start alone: pid file, the reason of a failure."""
    shm: str
    """How its regions in /dev/shm begin."""
    page: str
    tokenizer: str
    served: Mapping[str, Any]
    stop_model: str
    bind: str
    ports: Mapping[str, int]
    """Where it answers if no open sockets were handed in: http, grpc, metrics."""
    ready_s: float
    drain_s: float
    end_s: float
    most: int = 0
    """Requests that are let in at once; 0: any number."""
    world: int = 1
    """Ranks on this node, which mpirun starts."""
    meeting: str = ""
    """The folder of the ranks that Slurm has started as tasks, of which this is the first."""
    wrapped: bool = False
    """They are those of TensorRT-LLM's LLM API."""


def main(path: str) -> int:
    settings = Settings(**json.loads(Path(path).read_text(encoding="utf-8")))
    why = Path(settings.own) / "why"
    try:
        return asyncio.run(_serve(settings))
    except HpcError as failed:
        why.write_text(json.dumps([failed.message, failed.hint]), encoding="utf-8")
        print(f"error: {failed.message}", file=sys.stderr, flush=True)
        return 1


async def _serve(settings: Settings) -> int:
    from aiohttp import web

    token = os.environ.pop(TOKEN)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    inner = {name: _free_port() for name in triton.PORTS}
    at = {name: f"127.0.0.1:{port}" for name, port in inner.items()}
    program, env = triton.program(Path(settings.own))
    repository = Path(settings.repository)
    if settings.meeting:
        argv = triton.of_rank(repository, inner, settings.shm, 0, wrapped=settings.wrapped, program=program)
    else:
        argv = triton.argv(repository, inner, settings.shm, world=settings.world, program=program)
    server = Triton(argv, env, Path(settings.own) / "pid")
    if settings.meeting:
        server.others = Meeting(Path(settings.meeting), 0, settings.world)
    door = Door(token, f"http://{at['http']}", f"http://{at['metrics']}", settings.stop_model, settings.most)
    app = door.app()
    served = Served(**settings.served)
    Api(door, served, Template(Path(settings.tokenizer))).add_to(app)
    page = Path(settings.page).read_text(encoding="utf-8")

    async def show(request: Any) -> web.Response:
        return web.Response(text=page, content_type="text/html")

    app.router.add_get("/", show)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
    try:
        if not await _is_ready(server, inner["http"], served, settings.ready_s, asked):
            return 0
        await runner.setup()
        sockets = _sockets(settings)
        async with rpc.opened(door, at["grpc"], sockets["grpc"]):
            for listening in (*sockets["http"], *sockets["metrics"]):
                await web.SockSite(runner, listening).start()
            server.watch()
            door.ready = True
            folder = StageDir(Path(settings.stage))
            told = asyncio.ensure_future(figures.keep(folder.figures, door.figures, door.metrics_text))
            try:
                await _stay(server, asked, lambda: _another(folder))
            finally:
                told.cancel()
            await _moved(door, asked, server)
            await _drained(door, settings.drain_s)
        return 0
    finally:
        door.closing = True
        await door.close()
        code = await asyncio.to_thread(server.end, settings.end_s)  # whoever asks meanwhile is told so
        print(f"Triton has ended with exit code {code}", flush=True)
        triton.sweep(settings.shm)
        await runner.cleanup()


async def _stay(server: Triton, asked: asyncio.Event, over: Callable[[], bool]) -> None:
    looked = time.monotonic()
    while not asked.is_set():
        _look(server)
        if time.monotonic() - looked > _LOOK_AGAIN_S:
            looked = time.monotonic()
            if over():
                return
        try:
            await asyncio.wait_for(asked.wait(), _WATCH_S)
        except asyncio.TimeoutError:
            continue


def _look(server: Triton) -> None:
    """HpcError where the server, another of its ranks, or the process of one of its models, is gone."""
    if server.others is not None:
        server.others.look()
    code = server.ended()
    if code is not None:
        raise _failed(server, f"Triton ended by itself, with exit code {code}")
    if server.lost():
        raise _failed(server, "the process of one of Triton's models has ended")


def _failed(server: Triton, what: str) -> HpcError:
    said = f": {server.errors[-1]}" if server.errors else ""
    hint = server.hints[-1] if server.hints else "its last lines are in the log: `hpc logs` shows them"
    return HpcError(what + said[:400], hint=hint)


def _another(folder: StageDir) -> bool:
    """True where another job has announced itself in our place."""
    own, found = os.environ.get("SLURM_JOB_ID", ""), endpoints.read(folder)
    return found is not None and found.job_id != own


async def _moved(door: Door, asked: asyncio.Event, server: Triton) -> None:
    """Another job has taken over: be ill for those who look, so that they go there, and still take what comes."""
    if asked.is_set():
        return
    print("another job has taken over: what is running here ends", flush=True)
    door.moved = True
    until = time.monotonic() + _MOVE_S
    await _stay(server, asked, lambda: time.monotonic() > until)


async def _drained(door: Door, within_s: float) -> None:
    """Let nobody in any more, and wait for those that are in."""
    door.closing = True
    until = time.monotonic() + within_s
    quiet = time.monotonic()
    while time.monotonic() < until and time.monotonic() - quiet < _QUIET_S:
        if door.running:
            quiet = time.monotonic()
        await asyncio.sleep(0.05)
    if door.running:
        print(f"{door.running} requests had not ended after {within_s:g} s, and were cut off", flush=True)


async def _is_ready(server: Triton, port: int, served: Served, within_s: float, asked: asyncio.Event) -> bool:
    """True once it has answered a real request; False where the end was asked for before. HpcError where never."""
    until = time.monotonic() + within_s
    while not await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/v2/health/ready"):
        if asked.is_set():
            return False
        _look(server)
        if time.monotonic() > until:
            raise _failed(server, f"Triton was not ready within {within_s:g} s")
        await asyncio.sleep(_LOOK_S)
    words = {"text_input": "hello", "max_tokens": 1}
    address = f"http://127.0.0.1:{port}/v2/models/{served.target}/generate"
    first = asyncio.ensure_future(asyncio.to_thread(_post, address, words))
    ending = asyncio.ensure_future(asked.wait())
    await asyncio.wait({first, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if asked.is_set():  # the request ends with the server
        return False
    if said := first.result():
        raise _failed(server, f"the first request failed: {said}")
    return True


def _get(url: str) -> bool:
    try:
        with _opener().open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):
        return False


def _post(url: str, words: Mapping[str, Any]) -> str:
    """What went wrong, or ""."""
    try:
        with _opener().open(urllib.request.Request(url, json.dumps(words).encode()), timeout=300) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as failed:
        return failed.read().decode(errors="replace")[:300]
    except (OSError, HTTPException) as failed:
        return str(failed)
    return text[:300] if '"error"' in text else ""


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sockets(settings: Settings) -> dict[str, list[socket.socket]]:
    """Where the door answers: the sockets that were handed in from the node's network, and its own loopback."""
    given = handed(os.environ)
    found = {name: [socket.socket(fileno=number)] for name, number in given.items()}
    for name, port in settings.ports.items():
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(("127.0.0.1" if given else settings.bind, port))
        own.listen(128)
        found.setdefault(name, []).append(own)
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
