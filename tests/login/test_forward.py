"""A relay's end on the login node, with a stub for srun that starts the node's end on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.core.endpoint import Endpoint
from hpc.core.errors import HpcError, UsageError
from hpc.login import asking, forward
from hpc.login.forward import Line
from hpc.node.enter import process_start

CHECKOUT = Path(forward.__file__).resolve().parents[2]
SRUN = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/asked"
while :; do case "$1" in --*) shift ;; *) break ;; esac; done
exec "$@"
"""
NO = "#!/bin/sh\necho 'srun: error: Unable to confirm allocation for job 7: Invalid job id specified' >&2; exit 1\n"


class Answering(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked and (more := self.request.recv(65536)):
            asked += more
        good = b"Authorization: Bearer s3cret\r\n" in asked
        self.request.sendall(
            b"HTTP/1.1 " + (b"200 OK" if good else b"403 Forbidden") + b"\r\nContent-Length: 0\r\n\r\n"
        )


@pytest.fixture
def port() -> Iterator[int]:
    """Of a small server that wants its token."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answering) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stub, and a folder for the sockets whose name is short."""
    state = tempfile.mkdtemp(prefix="hpc-")
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    (tmp_path / "bin").mkdir()
    yield script(tmp_path / "bin" / "srun", SRUN)
    shutil.rmtree(state)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def line(srun: Path, port: int) -> Iterator[Line]:
    made = forward.line(job_id="7", node="dgx06", python=sys.executable, code=str(CHECKOUT), ports={"http": port})
    yield made
    forward.stop(made)


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_socket_is_private_and_leads_to_the_service(line: Line) -> None:
    assert asking.through_relay(line, "/health", "s3cret") == asking.Answer(True, "answers")
    assert not asking.through_relay(line, "/health", "wrong").ok
    path = Path(line.sockets["http"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_second_call_finds_the_first_ones(line: Line, srun: Path) -> None:
    forward.ensure(line)
    forward.ensure(line)
    (asked,) = (srun.parent / "asked").read_text().splitlines()
    assert asked.startswith("--overlap --jobid=7 --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=dgx06")
    assert forward.stop(line)
    assert not forward.stop(line)
    assert not Path(line.sockets["http"]).exists()


def test_one_that_leads_elsewhere_now_is_replaced(line: Line) -> None:
    forward.ensure(line)
    first = json.loads(line.record.read_text())["pid"]
    moved = forward.line(job_id="7", node="dgx07", python=line.python, code=line.code, ports=line.ports)
    forward.ensure(moved)
    assert json.loads(line.record.read_text())["pid"] != first
    assert process_start(first) is None


def test_end_of_the_step_is_the_end_of_all(line: Line) -> None:
    forward.ensure(line)
    pid = json.loads(line.record.read_text())["pid"]
    (step,) = (int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(step, signal.SIGKILL)
    until(lambda: not line.record.exists() and not Path(line.sockets["http"]).exists())


def test_killed_one_leaves_no_step(line: Line) -> None:
    forward.ensure(line)
    pid = json.loads(line.record.read_text())["pid"]
    (step,) = (int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(pid, signal.SIGKILL)
    until(lambda: process_start(step) is None)
    assert asking.through_relay(line, "/health", "s3cret").ok


def test_a_step_that_cannot_start_is_told(line: Line, srun: Path) -> None:
    script(srun, NO)
    with pytest.raises(HpcError, match="its job has ended"):
        forward.ensure(line)
    assert not asking.through_step(line, "/health", "s3cret").ok
    assert not asking.through_relay(line, "/health", "s3cret").ok


def test_a_socket_that_cannot_be_made_is_told(line: Line) -> None:
    long = str(line.record.with_name("x" * 150))
    with pytest.raises(HpcError, match="path too long"):
        forward.ensure(replace(line, sockets={**line.sockets, "grpc": long}, ports={**line.ports, "grpc": 1}))


def test_one_that_ends_before_it_is_told_to(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    line.record.write_text(json.dumps({"pid": ended.pid, "start": "1"}))
    monkeypatch.setattr(forward, "alive", lambda pid, start: line.record.exists())
    assert forward.stop(line)
    line.record.unlink()


def test_one_question_by_a_step_of_its_own(line: Line) -> None:
    assert asking.through_step(line, "/health", "s3cret") == asking.Answer(True, "answers")
    assert asking.through_step(line, "/health", "no").said == "answers HTTP/1.1 403 Forbidden to its own token"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = forward.line(
            job_id="7", node="x", python=line.python, code=line.code, ports={"http": unused.getsockname()[1]}
        )
        assert asking.through_step(dead, "/", "x").said == "refuses the connection: nothing listens there"


def test_path_that_no_socket_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("x" * 100)))
    with pytest.raises(UsageError, match="too long"):
        forward.line(job_id="7", node="x", python="", code="", ports={"http": 1})


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [("127.0.0.1", 1, "refuses the connection"), ("no-such-host.invalid", 1, "does not know its node's name")],
)
def test_what_does_not_answer_is_told_in_words(host: str, port: int, said: str) -> None:
    answer = asking.direct(host, port, "/", "x")
    assert not answer.ok
    assert said in answer.said


def test_reach_is_the_sites_unless_it_runs_here() -> None:
    from hpc.core.site import Site

    there = Endpoint(
        host="dgx06", bound="127.0.0.1", ports={"http": 1}, path="/", health="/", job_id="", pid=1, ready=1
    )
    here = Endpoint(**{**there.__dict__, "host": os.uname().nodename})
    site = Site(name="x", scheduler="slurm", reach="relay")
    assert (asking.reach_of(there, site), asking.reach_of(here, site)) == ("relay", "direct")
    assert asking.reach_of(there, Site(name="x", reach="jump")) == "direct"
