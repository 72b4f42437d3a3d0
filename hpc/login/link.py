"""One login to a host that every question and every forwarded port shares: a password or a code is asked for once.

It is a master of OpenSSH's own multiplexing with its socket in a private folder, or the user's (ControlMaster in
~/.ssh/config) where that one is up already. Forwarded bytes never pass through this program.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hpc.core.errors import RuntimeUnavailable
from hpc.login import guard, ssh

_MASTER = (
    "-M", "-N", "-T", "-o", "ControlPersist=no", "-o", "ClearAllForwardings=yes", "-o", "PermitLocalCommand=no",
    "-o", "RemoteCommand=none", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=20",
)  # fmt: skip
_LOOK_S = 0.05


class Guard:
    """A private folder, and a small program that removes it and ends every connection once this one is gone."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hpc-"))  # 0700
        self._tasks: dict[str, tuple[Sequence[Sequence[str]], Sequence[int]]] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", guard.__file__], stdin=subprocess.PIPE, text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        self.keep("", [], [])

    def keep(self, owner: str, commands: Sequence[Sequence[str]], pids: Sequence[int]) -> None:
        """At the end: run these commands, end these processes. It replaces what the same owner said before."""
        self._tasks[owner] = commands, pids
        task = {
            "commands": [argv for commands, _ in self._tasks.values() for argv in commands],
            "pids": [pid for _, pids in self._tasks.values() for pid in pids],
            "folder": str(self.folder),
        }
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # somebody has ended it: we go on without
            print(json.dumps(task), file=self._process.stdin, flush=True)

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class Link:
    """The login. `through` is a link to a host on the way."""

    def __init__(self, host: str, held: Guard, through: Link | None = None) -> None:
        self.host = host
        self._guard = held
        self._ssh = ssh.program(os.environ)
        self._through = through
        self._socket = held.folder / ("node" if through else "login")  # short: a socket's path has 104 bytes at most
        self._process: subprocess.Popen[bytes] | None = None
        self._said: ssh.Said | None = None
        self._users = False
        """The user's own master is used."""
        self._forwards: list[str] = []

    def open(self, show: bool = True) -> None:
        """Log in, which may ask at the terminal. RuntimeUnavailable with the reason where that fails.

        `show`: what ssh says meanwhile is shown, e.g. the portal's greeting.
        """
        self.close()
        self._users = self._through is None and self._call("-O", "check", of_user=True)[0]
        if self._users:
            return
        way = ["-o", f"ProxyCommand={self._through.way()}"] if self._through else []
        argv = [*self._ssh, *_MASTER, *way, "-o", f"ControlPath={_escaped(self._socket)}", self.host]
        self._process = ssh.start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self._said = ssh.Said(self._process, show=lambda line: show and not self._socket.exists())
        self._tell()
        while not self._socket.exists():
            if self._process.poll() is not None:
                raise self.failure()
            time.sleep(_LOOK_S)

    @property
    def alive(self) -> bool:
        if self._users:
            return self._call("-O", "check")[0]
        return self._process is not None and self._process.poll() is None

    @property
    def lost(self) -> bool:
        """True where our own connection has ended. Costs nothing, and says nothing of the user's."""
        return self._process is not None and self._process.poll() is not None

    def failure(self) -> RuntimeUnavailable:
        """Why it is not alive."""
        return ssh.failure(self._said.end() if self._said else [], self.host)

    def last_words(self) -> str:
        """What ssh said last, e.g. why the other end could not be connected to."""
        return next(iter(reversed(self._said.lines)), "") if self._said else ""

    def command(self, text: str) -> list[str]:
        """The argv that runs a command line there."""
        return [*self._base(), "-T", self.host, text]

    def way(self) -> str:
        """The ProxyCommand of a connection that goes on from here."""
        return f"{shlex.join([*self._base(), '-W'])} [%h]:%p {shlex.quote(self.host)}"

    def forward(self, specs: Sequence[str]) -> None:
        """Let these ports lead there (as -L has them), and no others. RuntimeUnavailable with ssh's reason."""
        self.cancel()
        done, words = self._call("-O", "forward", *(word for spec in specs for word in ("-L", spec)))
        if not done:
            raise RuntimeUnavailable(
                f"ssh could not open the local port: {self.last_words() or words}", hint="choose another: --local-port"
            )
        self._forwards = list(specs)
        self._tell()

    def leads(self, specs: Sequence[str]) -> bool:
        """True where exactly these ports lead there by it."""
        return self._forwards == specs and self.alive

    def cancel(self) -> None:
        """No port leads there any more."""
        if self._forwards and self.alive:
            self._call(*self._cancel())
        self._forwards = []

    def close(self) -> None:
        """Log out; the user's own connection stays, without our ports."""
        self.cancel()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        self._socket.unlink(missing_ok=True)
        self._tell()

    def _cancel(self) -> list[str]:
        return ["-O", "cancel", *(word for spec in self._forwards for word in ("-L", spec))]

    def _tell(self) -> None:
        commands = [[*self._base(), *self._cancel(), self.host]] if self._users and self._forwards else []
        self._guard.keep(self._socket.name, commands, [self._process.pid] if self._process else [])

    def _base(self, of_user: bool = False) -> list[str]:
        """ssh for what goes over the connection that is there; no setting of the user's has a say in our own."""
        if self._users or of_user:
            return self._ssh
        return [*self._ssh, "-F", "none", "-o", "ControlMaster=no", "-o", f"ControlPath={_escaped(self._socket)}"]

    def _call(self, *words: str, of_user: bool = False) -> tuple[bool, str]:
        argv = [*self._base(of_user), *words, self.host]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
        return done.returncode == 0, done.stderr.strip()


def _escaped(path: Path) -> str:
    return str(path).replace("%", "%%")
