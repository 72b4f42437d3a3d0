"""Opens a page whose address holds a token, without the token in the browser's argv, which every user can read."""

from __future__ import annotations

import secrets
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PATIENCE_S = 60


def show(url: str) -> bool:
    """The browser gets an address that leads to `url` once, and to nobody after that. False: there is no browser."""
    word = secrets.token_urlsafe(16)
    server = _Once(word, url)
    threading.Thread(target=server.serve, daemon=True).start()
    return webbrowser.open(f"http://127.0.0.1:{server.server_port}/{word}")


class _Once(ThreadingHTTPServer):
    """A thread for each visitor: browsers open connections ahead on which nothing comes."""

    daemon_threads = True

    def __init__(self, word: str, url: str) -> None:
        self.timeout = _PATIENCE_S
        self.idle = False
        first = threading.Lock()  # taken by the right visitor, for good

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != f"/{word}" or not first.acquire(blocking=False):
                    self.send_error(404)
                    return
                self.send_response(302)
                self.send_header("Location", url)
                self.send_header("Cache-Control", "no-store")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on the terminal."""

        super().__init__(("127.0.0.1", 0), Handler)

    def handle_timeout(self) -> None:
        self.idle = True

    def serve(self) -> None:
        """Until nobody has come for a minute."""
        while not self.idle:
            self.handle_request()
        self.server_close()
