"""A service stage for tests: a small HTTP server behind a token, in the image that has Python alone."""

from __future__ import annotations

from pathlib import Path

NAME = "door"
_STAGE = '''"""door: answers to its token, and does what it is told."""

from dataclasses import dataclass

from hpc.core.stage import Context, Resources, Stage

SERVER = """
import http.server, os, socketserver, sys, time
print("door opens", flush=True)
time.sleep(float(os.environ["DELAY"]))
while os.environ["GATE"] and not os.path.exists(os.environ["GATE"]):
    time.sleep(0.01)
if os.environ["FAIL"]:
    sys.exit(os.environ["FAIL"])

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        good = self.headers.get("Authorization") == "Bearer " + os.environ["TOKEN"]
        good = good or query == "token=" + os.environ["TOKEN"]
        if good and path in ("/die", "/leave"):
            os._exit(3 if path == "/die" else 0)
        body = bytes(int(path[5:])) if good and path[:5] == "/big/" else os.uname().nodename.encode() if good else b""
        self.send_response(200 if good else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    delay: float = 0.0
    gate: bool = False
    """It listens as soon as the file `go` is in the stage's folder."""
    fail: str = ""
    port: int = 0
    ready_s: float = 60.0


def run(config: Config, ctx: Context) -> None:
    import sys

    from hpc.inside.service import Server, serve

    serve(ctx, Server(
        argv=lambda ports: [sys.executable, "-c", SERVER, ctx.bind, str(ports["http"])],
        env=lambda token: {"TOKEN": token, "DELAY": str(config.delay), "FAIL": config.fail,
                           "GATE": str(ctx.folder / "go") if config.gate else ""},
        health="/health", path="/page", wish=config.port, ready_s=config.ready_s,
    ))


STAGE = Stage(
    name="door", summary="A service for tests", config=Config, container="train", consumes={}, run=run,
    outputs=lambda config: {}, resources=lambda config: Resources(cpus_per_task=1, mem_gb=1, time_min=5),
    service=True,
)
'''


def write(folder: Path) -> str:
    """Put the stage into a `stages` folder; its name."""
    (folder / f"{NAME}.py").write_text(_STAGE)
    return NAME
