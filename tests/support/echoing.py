"""A service stage for tests: a small HTTP server that wants its token, and does what its config says."""

from __future__ import annotations

from pathlib import Path

_STAGE = '''"""A service for tests."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from hpc.core.stage import Context, Resources, Stage

SERVER = """
import hashlib, http.server, os, sys, time, urllib.parse

bind, delay, lives, *ports = sys.argv[1:]
print("the server begins", flush=True)
time.sleep(float(delay))
if float(lives) < 0:
    sys.exit("the model file is broken")

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(b"hello from " + os.uname().nodename.encode())

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body):
        path = urllib.parse.urlparse(self.path)
        asked = urllib.parse.parse_qs(path.query).get("token", [""])[0]
        good = os.environ["TOKEN"] in (asked, (self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if good and path.path in ("/die", "/leave"):
            print("the server dies" if path.path == "/die" else "the server is left", flush=True)
            os._exit(3 if path.path == "/die" else 0)
        body = body if good else b"Password or token"
        self.send_response(200 if good else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

servers = [http.server.ThreadingHTTPServer((bind, int(port)), Handler) for port in ports]
import threading
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep(float(lives) or 1e6)
print("the server dies", flush=True)
os._exit(3)
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    delay: float = 0.0
    lives: float = 0.0
    """Seconds until it dies; 0: for ever; less: it never answers."""
    several: bool = False


def run(config: Config, ctx: Context) -> None:
    from hpc.inside.service import Server, serve

    serve(ctx, Server(
        argv=lambda ports: [sys.executable, "-c", SERVER, ctx.bind, str(config.delay), str(config.lives),
                            *map(str, ports.values())],
        env=lambda token: {{"TOKEN": token}}, health="/health", path="/lab",
        ports=("http", "grpc", "metrics") if config.several else ("http",),
    ))


STAGE = Stage(
    name="{name}",
    summary="A service for tests",
    config=Config,
    container="train",
    consumes={{}},
    outputs=lambda config: {{}},
    resources=lambda config: Resources(cpus_per_task=1, mem_gb=1, time_min=10),
    service=True,
    run=run,
)
'''


def write(folder: Path, name: str = "echo") -> str:
    """Put the service into a `stages` folder; its name."""
    (folder / f"{name}.py").write_text(_STAGE.format(name=name))
    return name
