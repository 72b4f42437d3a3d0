"""A program that serves, inside the image: a port that is really ours, a token, ready when it answers, a clean end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from hpc.core import endpoint as endpoints
from hpc.core import rundir
from hpc.core.endpoint import FIRST_PORT, LAST_PORT, Endpoint
from hpc.core.errors import HpcError
from hpc.core.rundir import StageDir
from hpc.core.stage import Context

_TRIES = 5
_LOOK_S = 0.1
_TELL_S = 5.0
_ANSWER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """What is to be started, and how one knows that it answers."""

    argv: Callable[[Mapping[str, int]], Sequence[str]]
    """Ports by name -> the command."""
    env: Callable[[str], Mapping[str, str]]
    """The token -> variables for the program. It must refuse whoever does not have it."""
    health: str
    """A path that answers 200 where the header `Authorization: Bearer TOKEN` is there, and refuses without it."""
    path: str = "/"
    """Of the page that a person opens."""
    ports: tuple[str, ...] = ("http",)
    """The names of its ports; the first answers HTTP."""
    wish: int = 0
    """The first port, where it is free; 0: any."""
    ready_s: float = 600
    """Seconds until it must have answered."""
    grace_s: float = 10
    """Seconds between SIGTERM and SIGKILL at the end."""
    cwd: Path = field(default_factory=Path.cwd)


def serve(ctx: Context, server: Server) -> None:
    """Start it, announce it once it answers, and stay until it ends or is asked to.

    A program that ends by itself with exit code 0 was ended by its user, or was idle: that is no error. The scheduler's
    warning before the time limit (USR2) is told, and the service goes on; SIGTERM ends it. A job of Slurm's may then be
    started again, so its token is left to `hpc.node.enter`. HpcError where it does not start, or dies.
    """
    folder = StageDir(ctx.folder)
    token = endpoints.token_of(folder)
    asked = _Asked(ctx)
    try:
        process, ports = _start(ctx, server, token, asked)
        with process:
            if not asked.end and process.poll() is None:
                endpoints.write(folder, _endpoint(ctx, server, ports, process.pid), token)
                ctx.event("ready", ports=dict(ports))
                endpoints.take_over(folder, _job())
            while not asked.end and process.poll() is None:
                time.sleep(_LOOK_S)
            endpoints.clear(folder, _job(), keep_token=asked.end and bool(_job()))
            code = _end(process, server.grace_s) if process.poll() is None else process.returncode
    finally:
        endpoints.clear(folder, _job(), keep_token=asked.end and bool(_job()))
    if code and not asked.end:
        raise HpcError(
            f"the service ended by itself: {_how(code)}", hint="its last lines are in the log: `hpc logs` shows them"
        )


class _Asked:
    """What the scheduler has asked for so far. The runner's own handlers hear it too."""

    def __init__(self, ctx: Context) -> None:
        self.end = False
        self._ctx = ctx
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._hear(signal.getsignal(number)))

    def _hear(self, earlier: object) -> Callable[[int, object], None]:
        def hear(number: int, frame: object) -> None:
            if callable(earlier):
                earlier(number, frame)
            if number == signal.SIGTERM:
                self.end = True
            else:
                self._ctx.event("ending", message="the time limit is near: save your work")

        return hear


def _start(
    ctx: Context, server: Server, token: str, asked: _Asked
) -> tuple[subprocess.Popen[bytes], Mapping[str, int]]:
    """The program, answering (or ended, where that was asked for meanwhile), and its ports."""
    sockets = endpoints.handed(os.environ)
    for _ in range(_TRIES):
        ports = _ports_of(sockets, server) if sockets else free_ports(server.ports, server.wish, ctx.bind)
        process = subprocess.Popen(
            server.argv(ports),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **server.env(token)},
            cwd=server.cwd,
            preexec_fn=as_a_child,
            pass_fds=tuple(sockets.values()),
        )
        if _answers(ctx, process, server, ports, token, asked):
            return process, ports
        _end(process, server.grace_s)
        if asked.end:
            return process, ports
        taken = [port for port in ports.values() if not sockets and not _is_free(port, ctx.bind)]
        if not taken:
            raise HpcError(
                f"the service ended before it answered: {_how(process.returncode)}",
                hint="its last lines are in the log: `hpc logs` shows them",
            )
        ctx.event("starting", message=f"port {taken[0]} was taken by another; choosing again")
    raise HpcError(f"no free port was found in {_TRIES} tries", hint="submit again, or on another node")


def _ports_of(sockets: Mapping[str, int], server: Server) -> dict[str, int]:
    """The ports of the open sockets that a private service got from outside its network."""
    ports = {}
    try:
        for name in server.ports:
            with socket.socket(fileno=os.dup(sockets[name])) as listening:
                ports[name] = listening.getsockname()[1]
    except OSError as error:
        raise HpcError(
            "the sockets that were opened for this service did not reach it",
            hint="does this Apptainer pass open files on? `hpc doctor` shows its version",
        ) from error
    return ports


def _answers(
    ctx: Context, process: subprocess.Popen[bytes], server: Server, ports: Mapping[str, int], token: str, asked: _Asked
) -> bool:
    """Wait until it answers: True; False where it has ended, or was asked to."""
    port, begin, told = ports[server.ports[0]], time.monotonic(), 0.0
    while not asked.end and process.poll() is None:
        if listens(port) and answers(f"http://127.0.0.1:{port}{server.health}", token):
            return True
        spent = time.monotonic() - begin
        if spent > server.ready_s:
            _end(process, server.grace_s)
            raise HpcError(
                f"the service did not answer within {server.ready_s:g} s",
                hint="see `hpc logs`; `ready_s` in the stage's settings gives it longer",
            )
        if spent - told >= _TELL_S:
            told = spent
            ctx.event("starting", message=f"no answer yet after {spent:.0f} s")
        time.sleep(_LOOK_S)
    return False


def free_ports(names: Sequence[str], wish: int, bind: str) -> dict[str, int]:
    """A free port for each name: the wish and those after it where they are free, else random ones."""
    wanted = list(range(wish, wish + len(names))) if wish else []
    found = [port for port in wanted if _is_free(port, bind)]
    for port in random.sample(range(FIRST_PORT, LAST_PORT + 1), LAST_PORT - FIRST_PORT + 1):
        if len(found) >= len(names):
            break
        if port not in found and _is_free(port, bind):
            found.append(port)
    if len(found) < len(names):
        raise HpcError(
            f"all ports from {FIRST_PORT} to {LAST_PORT} are taken on this node", hint="submit again elsewhere"
        )
    return dict(zip(names, found, strict=False))


def _is_free(port: int, bind: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except (OSError, OverflowError):  # above the last port
            return False
        return True


def listens(port: int) -> bool:
    """True where the port is listened on, by processes of this user alone: another one must not get the token."""
    owners = {uid for number, uid in _listeners() if number == port}
    return owners == {os.getuid()}


def _listeners() -> Iterator[tuple[int, int]]:
    """(port, user id) of every listening TCP socket, as /proc/net/tcp has them (Linux, proc(5))."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    yield int(fields[1].rpartition(":")[2], 16), int(fields[7])


def answers(url: str, token: str) -> bool:
    """True where the address answers 200 to the token; no proxy is asked."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ANSWER_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, HTTPException):  # what answered may be no HTTP; URLError is an OSError
        return False


def _endpoint(ctx: Context, server: Server, ports: Mapping[str, int], pid: int) -> Endpoint:
    return Endpoint(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        bound=ctx.bind,
        ports=ports,
        path=server.path,
        health=server.health,
        job_id=_job(),
        pid=pid,
        ready=time.time(),
    )


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _end(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Ask it to end, and make it end."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def as_a_child() -> None:
    """In the child, before exec: it ends with us, and not by the warning before the time limit.

    Slurm sends that to every process of the job; what is ignored stays so in the children's children.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _how(code: int) -> str:
    return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def fill(folder: Path, templates: Path) -> list[str]:
    """Copy to the folder what it does not have yet; the names of what was copied. Nothing is ever overwritten."""
    made = []
    for source in sorted(p for p in templates.rglob("*") if p.is_file()):
        target = folder / source.relative_to(templates)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            rundir.write_text(target, source.read_text(encoding="utf-8"))
            made.append(str(source.relative_to(templates)))
    return made
