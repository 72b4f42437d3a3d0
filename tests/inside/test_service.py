"""A service is announced when it answers, to nobody before; it ends cleanly, and says why where it does not start."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.core import endpoint, rundir
from hpc.core.rundir import StageDir
from hpc.inside import service

CHECKOUT = Path(service.__file__).resolve().parents[2]
SERVER = """
import http.server, os, sys, time
time.sleep(float(sys.argv[2]))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        good = self.headers.get("Authorization") == "Bearer " + os.environ["TOKEN"]
        if good and self.path == "/die":
            os._exit(3)
        if good and self.path == "/leave":
            os._exit(0)
        self.send_response(200 if good else 403)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
PAYLOAD = """
import sys
from pathlib import Path
from hpc.core.errors import HpcError
from hpc.inside import once, service

class Ctx:
    folder = Path(sys.argv[1])
    bind = "127.0.0.1"
    def event(self, phase, **values):
        from hpc.core import rundir
        rundir.append_event(self.folder / "events", phase, **values)

once.told_once()
{before}
try:
    service.serve(Ctx(), service.Server(
        argv=lambda ports: [sys.executable, "-c", {server!r}, str(ports["http"]), {delay!r}],
        env=lambda token: {{"TOKEN": token}}, health="/health", path="/page", {options}
    ))
except HpcError as error:
    print(error.message)
    sys.exit(9)
"""


class Service:
    """One payload that serves, as the runner would start it."""

    def __init__(self, folder: Path) -> None:
        self.folder = StageDir(folder)
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, *, delay: str = "0", server: str = SERVER, options: str = "", before: str = "", job: str = ""
    ) -> None:
        code = PAYLOAD.format(server=server, delay=delay, options=options, before=before)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.folder.path],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "SLURM_JOB_ID": job},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ready(self, timeout: float = 60) -> endpoint.Endpoint:
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while (found := endpoint.read(self.folder)) is None:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return found

    def end(self, number: int | None = None) -> tuple[int, str]:
        assert self.process is not None
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        assert "Traceback" not in err, err
        return self.process.returncode, out.strip()

    @property
    def token(self) -> str:
        return self.folder.token.read_text()

    def events(self) -> list[dict[str, Any]]:
        return rundir.last_events(self.folder.path / "events")


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Service]:
    it = Service(tmp_path)
    yield it
    if it.process is not None and it.process.poll() is None:
        it.process.kill()
        it.process.communicate()


def ask(found: endpoint.Endpoint, path: str, token: str) -> bool:
    return service.answers(f"http://127.0.0.1:{found.port}{path}", token)


def test_it_is_announced_when_it_answers_and_not_before(serving: Service) -> None:
    serving.start(delay="1")
    time.sleep(0.7)
    assert endpoint.read(serving.folder) is None
    found = serving.ready()
    assert ask(found, "/health", serving.token)
    assert not ask(found, "/health", "wrong")
    assert 9000 <= found.port <= 9999
    assert found.host == os.environ.get("SLURMD_NODENAME", socket.gethostname())
    *before, last = [e["phase"] for e in serving.events()]
    assert last == "ready"
    assert "ready" not in before  # "starting" may be there: another program can take the port it had chosen


def test_token_is_for_its_owner_alone_and_not_in_any_argument(serving: Service) -> None:
    serving.start()
    found = serving.ready()
    assert stat.S_IMODE(serving.folder.token.stat().st_mode) == 0o600
    assert len(serving.token) >= 40
    assert serving.token not in Path(f"/proc/{found.pid}/cmdline").read_text()
    assert serving.token not in serving.folder.endpoint.read_text()


def test_end_takes_the_announcement_away(serving: Service) -> None:
    serving.start()
    found = serving.ready()
    assert serving.end(signal.SIGTERM) == (0, "")
    assert not serving.folder.endpoint.exists()
    assert not serving.folder.token.exists()
    assert not Path(f"/proc/{found.pid}").exists()


def test_token_of_a_slurm_job_outlives_an_end_that_was_asked_for_and_no_other(serving: Service) -> None:
    """The job may be requeued; hpc.node.enter knows better, and takes the token away where it is not."""
    serving.start(job="7")
    serving.ready()
    token = serving.token
    serving.end(signal.SIGTERM)
    assert serving.token == token
    assert stat.S_IMODE(serving.folder.token.stat().st_mode) == 0o600
    serving.start(job="7")
    found = serving.ready()
    assert serving.token == token
    ask(found, "/leave", token)
    assert serving.end() == (0, "")
    assert not serving.folder.token.exists()
    serving.start()
    assert ask(serving.ready(), "/health", serving.token)
    assert serving.token != token


def test_warning_before_the_limit_is_told_and_it_serves_on(serving: Service) -> None:
    serving.start()
    found = serving.ready()
    os.kill(found.pid, signal.SIGUSR2)  # Slurm signals every process of the job
    assert serving.process is not None
    serving.process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + 60
    while serving.events()[-1]["phase"] != "ending":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # some looks of the service
    assert ask(found, "/health", serving.token)
    assert serving.events()[-1]["phase"] == "ending"
    assert endpoint.read(serving.folder) == found
    assert serving.end(signal.SIGTERM) == (0, "")


def test_asked_to_end_while_it_starts(serving: Service) -> None:
    serving.start(delay="600", options="grace_s=300")
    assert serving.process is not None
    children = Path(f"/proc/{serving.process.pid}/task/{serving.process.pid}/children")
    begin = time.monotonic()
    while not children.read_text():  # the server
        assert time.monotonic() - begin < 60
        time.sleep(0.02)
    begin = time.monotonic()
    assert serving.end(signal.SIGTERM) == (0, "")
    assert time.monotonic() - begin < 60, "it waits for neither"


def test_server_that_does_not_heed_sigterm_is_killed(serving: Service) -> None:
    serving.start(server="import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER, options="grace_s=1")
    found = serving.ready()
    assert serving.end(signal.SIGTERM) == (0, "")
    assert not Path(f"/proc/{found.pid}").exists()


def test_death_at_the_start_is_told(serving: Service) -> None:
    serving.start(server="import sys; sys.exit(4)")
    assert serving.end() == (9, "the service ended before it answered: exit code 4")
    assert not serving.folder.endpoint.exists()


def test_death_later_is_told(serving: Service) -> None:
    serving.start()
    found = serving.ready()
    ask(found, "/die", serving.token)
    assert serving.end() == (9, "the service ended by itself: exit code 3")
    assert not serving.folder.endpoint.exists()


def test_end_by_its_user_is_no_error(serving: Service) -> None:
    serving.start()
    ask(serving.ready(), "/leave", serving.token)
    assert serving.end() == (0, "")


def test_no_answer_in_time_is_told(serving: Service) -> None:
    serving.start(delay="600", options="ready_s=1")
    assert serving.end() == (9, "the service did not answer within 1 s")


def test_a_port_that_is_wished_for(serving: Service) -> None:
    # of those that neither a service nor the kernel chooses, one that is this process's own: nobody takes it meanwhile
    own = range(10_000 + os.getpid() % 20_000, 31_000)
    wish = next(port for port in own if service._is_free(port, "127.0.0.1"))
    serving.start(options=f"wish={wish}")
    assert serving.ready().port == wish


def test_wish_that_is_taken_gives_another_port(serving: Service) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        serving.start(options=f"wish={other.getsockname()[1]}")
        assert serving.ready().port != other.getsockname()[1]


def test_port_that_is_taken_between_choice_and_start_is_chosen_again(serving: Service) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        before = (
            "real, calls = service.free_ports, []\n"
            "def free_ports(names, wish, bind):\n"
            "    calls.append(1)\n"
            f"    return {{'http': {taken}}} if len(calls) == 1 else real(names, wish, bind)\n"
            "service.free_ports = free_ports\n"
        )
        serving.start(before=before, options="grace_s=1")
        found = serving.ready()
    assert found.port != taken
    assert any(f"port {taken} was taken" in e.get("message", "") for e in serving.events())


def test_listener_of_somebody_else_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        port = own.getsockname()[1]
        assert service.listens(port)
        monkeypatch.setattr(service.os, "getuid", lambda: 12345)
        assert not service.listens(port)


def test_several_ports_are_different_and_free() -> None:
    ports = service.free_ports(["http", "grpc", "metrics"], 0, "127.0.0.1")
    assert list(ports) == ["http", "grpc", "metrics"]
    assert len(set(ports.values())) == 3


def test_there_is_no_port_after_the_last_one() -> None:
    ports = service.free_ports(["http", "grpc"], 65535, "127.0.0.1")
    assert all(port <= 65535 for port in ports.values())


def test_workspace_is_filled_and_never_overwritten(tmp_path: Path) -> None:
    templates, workspace = tmp_path / "templates", tmp_path / "workspace"
    (templates / "sub").mkdir(parents=True)
    (templates / "a.txt").write_text("new")
    (templates / "sub" / "b.txt").write_text("new")
    workspace.mkdir()
    (workspace / "a.txt").write_text("mine")
    assert service.fill(workspace, templates) == ["sub/b.txt"]
    assert (workspace / "a.txt").read_text() == "mine"
    assert service.fill(workspace, templates) == []
