"""For notebooks: a service that runs beside the kernel, for as long as that lives, and what one can ask of it."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from hpc.core import endpoint as endpoints
from hpc.core import rundir
from hpc.core.endpoint import Endpoint
from hpc.core.errors import HpcError, Interrupted
from hpc.core.rundir import AttemptDir, StageDir
from hpc.inside.notebook import LabError

_LOOK_S = 0.1
_END_S = 90
"""So long may it let running requests finish, and end."""
_WIDTH = 78


class Server:
    """A service that answers, to the notebook alone: nobody else has its token."""

    def __init__(
        self, name: str, folder: StageDir, attempt: AttemptDir, process: subprocess.Popen[bytes], endpoint: Endpoint
    ) -> None:
        self.name = name
        self.folder = folder.path
        self.url = f"http://127.0.0.1:{endpoint.port}"
        self._stage, self._attempt, self._process = folder, attempt, process
        self._token = folder.token.read_text(encoding="utf-8")

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ask(self, path: str, words: Mapping[str, Any] | None = None) -> Any:
        """The JSON that it answers, else the text: GET, or POST where there are words."""
        with self._open(path, words) as answer:
            text = answer.read().decode()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def stream(self, path: str, words: Mapping[str, Any]) -> Iterator[Any]:
        """The JSON of each server-sent event of an answer, as it comes."""
        with self._open(path, words) as answer:
            for line in answer:
                event = line.decode().strip().removeprefix("data:").strip()
                if event.startswith("{"):
                    yield json.loads(event)

    def log(self, lines: int = 10) -> str:
        """The last lines that it printed."""
        return "\n".join(rundir.tail(self._attempt.stdout)[-lines:])

    def stop(self) -> None:
        """Let running requests finish, and end it. Harmless where it has ended."""
        if self.runs:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            print(f"{self.name}: ended")
        endpoints.clear(self._stage)

    def __repr__(self) -> str:
        return f"<{self.name} at {self.url}, {'runs' if self.runs else 'has ended'}>"

    @contextmanager
    def _open(self, path: str, words: Mapping[str, Any] | None) -> Iterator[Any]:
        data = None if words is None else json.dumps(words).encode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(self.url + path, data, headers)) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise LabError(f"{self.name} answered {error.code} to {path}: {said}", hint="see its log: .log()") from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise LabError(
                f"{self.name} does not answer: {why}", hint="has it ended? Start it again; .log() says more"
            ) from None


@contextmanager
def sockets_for(names: Sequence[str]) -> Iterator[Mapping[str, int]]:
    """For a service with a network of its own: port name -> a socket in front of it, on this machine's loopback."""
    with ExitStack() as stack:
        opened = {name: stack.enter_context(socket.socket()) for name in names}
        for listening in opened.values():
            listening.bind(("127.0.0.1", 0))
            listening.listen(128)
        yield {name: listening.fileno() for name, listening in opened.items()}


def environment(sockets: Mapping[str, int]) -> dict[str, str]:
    """What it is told of them. It is no job of Slurm's itself: nobody starts it again with the same token."""
    return {"SLURM_JOB_ID": "", **endpoints.handing(sockets)}


def until_ready(
    name: str, folder: StageDir, attempt: AttemptDir, process: subprocess.Popen[bytes], fail: Callable[[int], HpcError]
) -> Server:
    """Wait until it answers, with one line that moves. `fail`: exit code -> the error where it has ended instead."""
    begin, shown = time.monotonic(), ""
    try:
        while (found := endpoints.read(folder)) is None:
            if process.poll() is not None:
                raise fail(process.returncode)
            line = f"{name}: starting, {time.monotonic() - begin:.0f} s"
            if line != shown:
                print(f"\r{line}".ljust(_WIDTH), end="", flush=True)
                shown = line
            time.sleep(_LOOK_S)
    except BaseException as error:
        if process.poll() is None:
            process.terminate()
            process.wait(_END_S)
        endpoints.clear(folder)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"{name} was stopped", hint="run the cell again") from None
        raise
    print(f"\r{name}: answers on port {found.port}, after {time.monotonic() - begin:.0f} s".ljust(_WIDTH))
    return Server(name, folder, attempt, process, found)
