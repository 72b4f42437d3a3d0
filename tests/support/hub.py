"""A small real server that speaks the hub's API and serves any file, with the faults that networks and people make."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "a" * 40


@dataclass
class Hub:
    """What it serves, and what it was asked."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """models/org/name or datasets/org/name -> its files."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path -> a file that belongs to no repository."""
    gated: dict[str, str] = field(default_factory=dict)
    """Repository -> the token that may read it."""
    cut: dict[str, int] = field(default_factory=dict)
    """File -> the connection breaks after so many bytes, once."""
    wrong: set[str] = field(default_factory=set)
    """Files that come with other bytes than they should."""
    tags: str = "strong"
    """What it says of a file's version: strong, weak, or none."""
    pace_s: float = 0.0
    """Between two parts of an answer."""
    after_part: Callable[[], None] = lambda: None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """(path, headers) of each request."""

    def ranges(self, name: str) -> list[str]:
        """The Range header of each request for a file, or ""."""
        return [headers.get("range", "") for path, headers in self.asked if path.endswith(name)]

    def info(self, repo: str) -> dict[str, Any]:
        """A repository as the API tells it: large files by sha256, small ones by git's name."""
        siblings = []
        for name, data in self.repos[repo].items():
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
            if not name.endswith((".json", ".txt")):
                found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(found)
        return {"id": repo.partition("/")[2], "sha": COMMIT, "siblings": siblings, "private": False}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append((path, {name.lower(): value for name, value in self.headers.items()}))
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            repo = "/".join(parts[1:4])
            self._json(self.hub.info(repo)) if repo in self.hub.repos else self._refuse(404, "RepoNotFound")
        elif "resolve" in parts:
            at = parts.index("resolve")
            repo = "/".join(parts[:at]) if parts[0] == "datasets" else "models/" + "/".join(parts[:at])
            wanted = self.hub.gated.get(repo)
            given = self.headers.get("Authorization", "")
            if wanted and given != f"Bearer {wanted}":
                self._refuse(403 if given else 401, "GatedRepo")
            else:
                self._file("/".join(parts[at + 2 :]), self.hub.repos[repo]["/".join(parts[at + 2 :])])
        elif path.lstrip("/") in self.hub.files:
            self._file(path.lstrip("/"), self.hub.files[path.lstrip("/")])
        elif path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/moved"))
            self.end_headers()
        else:
            self._refuse(404, "EntryNotFound")

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, name: str, data: bytes) -> None:
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        tag = {"strong": tag, "weak": f"W/{tag}", "none": ""}[self.hub.tags]
        if tag and self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return
        if name in self.hub.wrong:
            data = b"x" * len(data)
        start, given = 0, self.headers.get("Range", "")
        if given and self.headers.get("If-Range", tag) == tag:
            start = int(given.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self._refuse(416, "")
                return
        self.send_response(206 if start else 200)
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut = self.hub.cut.pop(name, None)
        body = data[start:] if cut is None else data[start:cut]
        for at in range(0, len(body), 1 << 16):
            self.wfile.write(body[at : at + (1 << 16)])
            self.hub.after_part()
            if self.hub.pace_s:
                threading.Event().wait(self.hub.pace_s)
        if cut is not None:
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a port of its own, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
