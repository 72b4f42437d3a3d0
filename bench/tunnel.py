"""A service on a node, reached from the laptop by `hpc tunnel --via`: how fast bytes come, and how soon it leads there.

Against `ssh -N -L`, opened by hand to the same service; both stay open, and are used in turn.
"""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ground import USER, Ground, ground
from measure import Fact, Line, NotMeasured, Pair

ROUNDS = 10
SIZE = 200 << 20
GOAL = 1.053  # of the time: 0.95 of the throughput
SHOWN_S, AGAIN_S = 1.0, 5.0
_STAGE = '''"""pour: a web server that sends as many bytes as its path says."""

import sys
from dataclasses import dataclass

from hpc.core.stage import Resources, Stage

_SERVER = """
import http.server, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        token = os.environ["TOKEN"]
        good = query == "token=" + token or self.headers.get("Authorization") == "Bearer " + token
        self.send_response(200 if good else 403)
        self.end_headers()
        for _ in range(int(path[1:] or 0) >> 20 if good else 0):
            self.wfile.write(block)

    def log_message(self, *args):
        pass

block = bytes(1 << 20)
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    number: int = 0


def run(config, ctx):
    from hpc.inside.service import Server, serve

    serve(ctx, Server(
        argv=lambda ports: [sys.executable, "-c", _SERVER, ctx.bind, str(ports["http"])],
        env=lambda token: {"TOKEN": token}, health="/",
    ))


STAGE = Stage(
    name="pour", summary="For a benchmark", config=Config, container="train", consumes={}, run=run, service=True,
    outputs=lambda config: {}, resources=lambda config: Resources(cpus_per_task=1, mem_gb=1, time_min=20),
)
'''
_FETCH = """
import json, sys, time, urllib.request
size, rounds, *urls = json.load(sys.stdin)
taken = [[] for _ in urls]
buffer = bytearray(1 << 20)
for number in range(rounds + 1):
    for url, times in zip(urls, taken):
        begin, got = time.perf_counter(), 0
        with urllib.request.urlopen(url, timeout=60) as answer:
            while part := answer.readinto(buffer):
                got += part
        assert got == size, got
        if number:
            times.append((time.perf_counter() - begin) * 1000)
print(json.dumps(taken))
"""


def lines(rounds: int) -> Iterator[Line]:
    with ground() as here:
        (stages,) = here.venv.glob("lib/python*/site-packages/stages")
        (stages / "pour.py").write_text(_STAGE)
        try:
            yield from _lines(here, rounds)
        finally:
            (stages / "pour.py").unlink()


def _lines(here: Ground, rounds: int) -> Iterator[Line]:
    run = json.loads(here.run(here.hpc, "submit", "pour", "--json"))["run"]
    with _tunnel(here) as shown:
        url, when = shown.get(timeout=60)
        endpoint = json.loads((here.folder / "runs" / run / "pour" / "endpoint.json").read_text())
        first_s = when - endpoint["ready"]
        with _bare(here, f"{endpoint['host']}:{endpoint['ports']['http']}") as port:
            ours, bare = (re.sub(r":\d+/", f":{p}/{SIZE}", url) for p in (_port(url), port))
            asked = json.dumps([SIZE, rounds, ours, bare])
            out = here.cluster.run(USER, here.python, "-c", _FETCH, node="laptop", timeout=900, input=asked).stdout
        ms, bare_ms = json.loads(out)
        yield Pair(
            what=f"{SIZE >> 20} MiB through hpc tunnel --via, to the laptop",
            ms=ms, against="ssh -N -L by hand, the same service", against_ms=bare_ms, goal=GOAL,
        )  # fmt: skip
        yield _fact("the service answers, until its address is shown on the laptop", first_s, SHOWN_S)
        here.run("scontrol", "requeue", endpoint["job_id"])
        _, when = shown.get(timeout=180)
        endpoint = json.loads((here.folder / "runs" / run / "pour" / "endpoint.json").read_text())
        yield _fact("requeued: it answers again, until the tunnel leads there", when - endpoint["ready"], AGAIN_S)


def _fact(what: str, seconds: float, goal_s: float) -> Fact:
    return Fact(what=what, found=f"{seconds:.2f} s", goal=f"≤ {goal_s:g} s", met=seconds <= goal_s)


@contextmanager
def _tunnel(here: Ground) -> Iterator[queue.Queue[tuple[str, float]]]:
    """What it shows when it leads there: the address, and after a requeue that it does again; each with the time."""
    shown: queue.Queue[tuple[str, float]] = queue.Queue()
    process = here.cluster.popen(
        USER, here.hpc, "tunnel", "--via", f"login:{here.folder}", "pour", node="laptop", env={"HPC_REMOTE": here.hpc},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def read() -> None:
        for line in process.stdout:
            if line.startswith("http") or " is ready again on " in line:
                shown.put((line.strip(), time.time()))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield shown
    except queue.Empty:
        raise NotMeasured("the tunnel never led to the service") from None
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def _bare(here: Ground, target: str) -> Iterator[int]:
    """The local port of an `ssh -N -L` on the laptop."""
    port = 23456
    argv = ["ssh", "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:{target}", "login"]
    process = here.cluster.popen(USER, *argv, node="laptop", stdin=subprocess.DEVNULL)
    wait = f"import socket, time\nwhile socket.socket().connect_ex(('127.0.0.1', {port})): time.sleep(0.1)"
    try:
        here.cluster.run(USER, here.python, "-c", wait, node="laptop", timeout=30)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _port(url: str) -> int:
    return int(re.sub(r".*:(\d+)/.*", r"\1", url))
