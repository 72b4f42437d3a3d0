"""The laptop's end of a tunnel, without ssh: its ports, its addresses, its browser, and who cleans up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.core.errors import RuntimeUnavailable
from hpc.login import browser, guard, route

DOCUMENT: dict[str, Any] = {
    "schema": "hpc.tunnel/1", "run": "jupyter-1", "stage": "jupyter", "node": "dgx06", "user": "kim", "token": "s3cret",
    "ports": {"http": 9250, "grpc": 9251}, "local_ports": {"http": 18000, "grpc": 18001}, "path": "/lab",
    "health": "/api/status", "reach": "direct", "targets": {"http": "dgx06:9250", "grpc": "dgx06:9251"},
}  # fmt: skip


def test_local_ports_that_are_really_used_are_told() -> None:
    service = route.service(DOCUMENT, "login")
    local = {"http": 18002, "grpc": 18003}
    assert service.forwards(local) == ["127.0.0.1:18002:dgx06:9250", "127.0.0.1:18003:dgx06:9251"]
    assert service.told(local)["local_ports"] == local
    assert service.told(local)["url"] == "http://localhost:18002/lab?token=s3cret"


def test_a_path_with_a_question_keeps_it() -> None:
    service = route.service({**DOCUMENT, "path": "/lab?reset"}, "login")
    assert service.url({"http": 1, "grpc": 2}) == "http://localhost:1/lab?reset&token=s3cret"


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {**DOCUMENT, "schema": "hpc.tunnel/2"}, {k: v for k, v in DOCUMENT.items() if k != "token"}],
)
def test_answer_of_another_version_is_refused(document: Any) -> None:
    with pytest.raises(RuntimeUnavailable, match="does not understand"):
        route.service(document, "login")


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "0.0.0.0")]
)
def test_port_that_anything_listens_on_is_not_free(family: socket.AddressFamily, address: str) -> None:
    ports = []
    for _ in range(5):
        with socket.socket(family) as taken:
            taken.bind((address, 0))
            taken.listen()
            ports.append(taken.getsockname()[1])
            assert not route.is_free(ports[-1])
            assert route.choose({"http": ports[-1]}, route.is_free)["http"] > ports[-1]
    assert any(map(route.is_free, ports)), "another program may have taken one of them meanwhile, not all"


def test_no_port_left_is_said() -> None:
    with pytest.raises(RuntimeUnavailable, match="no local port"):
        route.choose({"http": 65530}, lambda port: False)


def test_browser_gets_no_token_in_its_argv_and_its_address_leads_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(browser.webbrowser, "open", lambda url: bool(opened.append(url)) or True)
    assert browser.show("http://localhost:1/lab?token=s3cret")
    assert "s3cret" not in opened[0]

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **options: Any) -> None:
            return None

    opener = urllib.request.build_opener(Stay, urllib.request.ProxyHandler({}))
    # browsers connect ahead, and say nothing
    with socket.create_connection(("127.0.0.1", int(opened[0].split(":")[2].partition("/")[0]))):
        visit(opener, opened[0])


def visit(opener: urllib.request.OpenerDirector, address: str) -> None:
    for path, code in ((address + "x", 404), (address, 302), (address, 404)):
        with pytest.raises(urllib.error.HTTPError) as answer:
            opener.open(path, timeout=60)
        assert (answer.value.code, path) == (code, path)
        assert (answer.value.headers["Location"] == "http://localhost:1/lab?token=s3cret") == (code == 302)
        answer.value.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_guard_ends_and_removes_all_when_its_holder_is_killed(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    folder, mark = tmp_path / "private", tmp_path / "ran"
    folder.mkdir()
    task = {"commands": [["touch", str(mark)]], "pids": [sleeper.pid], "folder": str(folder)}
    code = f"""
import subprocess, sys, time
held = subprocess.Popen([sys.executable, "-S", "-E", {guard.__file__!r}], stdin=subprocess.PIPE, start_new_session=True)
held.stdin.write({(json.dumps(task) + chr(10)).encode()!r}); held.stdin.write(b"half"); held.stdin.flush()
print(held.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        until(lambda: ignores(pid, signal.SIGTERM))
        os.kill(pid, signal.SIGTERM)  # a logout ends everything of the session
        assert sleeper.poll() is None
        holder.kill()
        assert sleeper.wait(60) == -signal.SIGTERM
    until(lambda: not folder.exists())
    assert mark.exists()


def ignores(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigIgn:")[2].split()[0], 16) >> (number - 1) & 1)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
