"""A relay's end on the login node: one private socket for each port of a service, all through one step in its job.

`python -m hpc.login.forward LINE.json` runs in the background until the job ends; hpc.node.relay is the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc.core import rundir
from hpc.core.errors import HpcError, NotReady, UsageError
from hpc.login import private, slurm
from hpc.node import relay
from hpc.node.enter import alive, process_start

_HELLO_S = 30
_END_S = 5
_PATH_BYTES = 107
"""The longest path of a socket, unix(7)."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a relay leads to, and by which sockets."""

    job_id: str
    node: str
    python: str
    """The node's Python."""
    code: str
    """The folder with the code that it runs."""
    ports: Mapping[str, int]
    sockets: Mapping[str, str]

    @property
    def record(self) -> Path:
        """Written when the sockets answer: {"pid", "start", "node", "ports"}."""
        return Path(next(iter(self.sockets.values()))).parent / f"{_name(self.job_id)}.json"

    @property
    def log(self) -> Path:
        """What srun says."""
        return self.record.with_suffix(".log")

    def argv(self) -> list[str]:
        program = [self.python, "-m", "hpc.node.relay", *map(str, self.ports.values())]
        return slurm.step(self.job_id, program, node=self.node)

    def env(self) -> dict[str, str]:
        return {**slurm.step_env(os.environ), "PYTHONPATH": self.code}


def line(*, job_id: str, node: str, python: str, code: str, ports: Mapping[str, int]) -> Line:
    """UsageError where the folder's path is too long for a socket."""
    sockets = {name: str(private.folder() / f"{_name(job_id)}-{name}.sock") for name in ports}
    longest = max(sockets.values(), key=len)
    if len(os.fsencode(longest)) > _PATH_BYTES:
        raise UsageError(f"{longest} is too long for a socket's path", hint="let XDG_STATE_HOME name a shorter folder")
    return Line(job_id=job_id, node=node, python=python, code=code, ports=ports, sockets=sockets)


def _name(job_id: str) -> str:
    """One login node's own: the folder is often shared by several."""
    return f"relay-{os.uname().nodename.partition('.')[0]}-{job_id}"


def ensure(wanted: Line) -> None:
    """The sockets answer after this; where they do already, nothing is done. NotReady where no step can be started."""
    with _lock(wanted):
        if _runs(wanted):
            return
        _stop(wanted.record)
        with open(os.open(wanted.log, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "r+", errors="replace") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "hpc.login.forward", json.dumps(asdict(wanted))],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True, cwd="/",
            )  # fmt: skip
            deadline = time.monotonic() + _HELLO_S
            while not _runs(wanted):
                if process.poll() is not None:
                    said.seek(0)  # its name may be gone already
                    raise slurm.step_failure(f"job {wanted.job_id}", said.read() or "the step has ended")
                if time.monotonic() > deadline:
                    process.terminate()
                    process.wait()
                    raise NotReady(f"no step in job {wanted.job_id} began within {_HELLO_S} s", hint="try again")
                time.sleep(0.05)
        process.returncode = 0  # it stays when we leave: nobody waits for it


def stop(wanted: Line) -> bool:
    """End the relay on this machine; False where none runs."""
    with _lock(wanted):
        return _stop(wanted.record)


def once(wanted: Line, port: int, request: bytes) -> bytes:
    """The first bytes that the port answers to these, through a step of its own; b"" where it takes no connection.

    HpcError where no step can be started.
    """

    async def ask() -> bytes:
        async with _step(wanted) as link:
            await link.send(1, relay.OPEN, relay.NUMBER.pack(port))
            await link.send(1, relay.DATA, request)
            while True:
                _, kind, data = await asyncio.wait_for(link.receive(), _HELLO_S)
                if kind in (relay.DATA, relay.END, relay.CLOSE):
                    return data

    try:
        return asyncio.run(ask())
    except (asyncio.IncompleteReadError, asyncio.TimeoutError):
        raise NotReady(f"no step can be started in job {wanted.job_id}", hint="`hpc doctor` looks further") from None


@contextlib.contextmanager
def _lock(wanted: Line) -> Iterator[None]:
    """One start or stop at a time."""
    with open(os.open(wanted.record.with_name("relay.lock"), os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _runs(wanted: Line) -> bool:
    known = rundir.read_json(wanted.record)
    return (
        known is not None
        and alive(known["pid"], known["start"])
        and (known["node"], known["ports"]) == (wanted.node, dict(wanted.ports))
    )


def _stop(record: Path) -> bool:
    known = rundir.read_json(record)
    if known is None or not alive(known["pid"], known["start"]):
        return False
    deadline = time.monotonic() + 2 * _END_S
    with contextlib.suppress(ProcessLookupError):  # it may end by itself meanwhile
        os.kill(known["pid"], signal.SIGTERM)
        while alive(known["pid"], known["start"]):
            if time.monotonic() > deadline:
                os.kill(known["pid"], signal.SIGKILL)
            time.sleep(0.05)
    return True


@contextlib.asynccontextmanager
async def _step(wanted: Line) -> AsyncIterator[relay.Link]:
    """The step in the job, which has said hello; it ends with this."""
    argv, pipe = wanted.argv(), subprocess.PIPE
    try:
        step = await asyncio.create_subprocess_exec(
            *argv, env=wanted.env(), stdin=pipe, stdout=pipe, limit=relay.WINDOW
        )
    except FileNotFoundError:
        raise slurm.missing(argv[0]) from None
    assert step.stdin is not None
    assert step.stdout is not None
    link = relay.Link(step.stdout, step.stdin)
    try:
        await asyncio.wait_for(link.receive(), _HELLO_S)
        yield link
    finally:
        step.stdin.close()  # the node's end leaves then
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(step.wait(), _END_S)
        if step.returncode is None:
            step.kill()


async def _forward(wanted: Line) -> None:
    servers = []
    async with _step(wanted) as link:
        try:
            for name, path in wanted.sockets.items():
                servers.append(await _listen(link, Path(path), wanted.ports[name]))
            pid = os.getpid()
            known = {"pid": pid, "start": process_start(pid), "node": wanted.node, "ports": dict(wanted.ports)}
            rundir.write_json(wanted.record, known)
            await link.serve()
        finally:
            for server in servers:
                server.close()
            for end in (*map(Path, wanted.sockets.values()), wanted.record, wanted.log):
                end.unlink(missing_ok=True)


async def _listen(link: relay.Link, path: Path, port: int) -> asyncio.AbstractServer:
    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await link.carry((reader, writer), port)

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(take, path, limit=relay.WINDOW)
    path.chmod(0o600)
    return server


async def _until_told(wanted: Line) -> None:
    """Until the step ends, or SIGTERM."""
    work = asyncio.ensure_future(_forward(wanted))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await work


def main(text: str) -> int:
    os.umask(0o077)
    try:
        asyncio.run(_until_told(Line(**json.loads(text))))
    except (asyncio.IncompleteReadError, asyncio.TimeoutError):
        return 1  # srun has said why
    except HpcError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
