"""The laptop's own ssh: how it is started, what it says, and what its failures mean."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc.core.errors import RuntimeUnavailable, UsageError


class LoginRefused(RuntimeUnavailable):
    """The login node does not let this user in. No use in trying again by itself."""


def program(env: Mapping[str, str]) -> list[str]:
    """ssh, or what HPC_SSH says, e.g. `ssh -F FILE`, or a portal's own wrapper."""
    try:
        words = shlex.split(env.get("HPC_SSH", ""))
    except ValueError:
        raise UsageError("HPC_SSH has a quote without its end", hint='write e.g. HPC_SSH="ssh -F FILE"') from None
    return words or ["ssh"]


def start(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start it; its prompts and questions go to the terminal, what it says to a pipe."""
    try:
        return subprocess.Popen(argv, stderr=subprocess.PIPE, **options)
    except (FileNotFoundError, PermissionError):
        raise RuntimeUnavailable(
            f"there is no {argv[0]} on this machine", hint="install OpenSSH's client, or name yours in HPC_SSH"
        ) from None


class Said:
    """What a process writes to stderr: kept (the last lines), and shown as it comes where `show` says so."""

    def __init__(self, process: subprocess.Popen[bytes], show: Callable[[str], bool]) -> None:
        self.lines: deque[str] = deque(maxlen=50)
        self._process = process
        self._show = show
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def end(self) -> list[str]:
        """The last lines, of a process that has ended. One that it left behind may hold the pipe: no wait for that."""
        self._thread.join(0.5)
        return list(self.lines)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as pipe:
            for raw in pipe:
                line = raw.decode("utf-8", "replace")
                self.lines.append(line.rstrip())
                if self._show(line):
                    sys.stderr.write(line)
                    sys.stderr.flush()


_ADVICE_LOGIN = (
    "a one-time login name may have expired: get a new one and give it as NEWNAME@HOST (hpc tunnel: also --login "
    "NEWNAME); no job is touched"
)
_FAILURES: tuple[tuple[str, type[RuntimeUnavailable], str, str], ...] = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", RuntimeUnavailable,
     "{host} shows another host key than before",
     "ask its administrators; where it was set up anew: ssh-keygen -R {name}"),
    (r"Host key verification failed", RuntimeUnavailable,
     "the host key of {host} is not known here", "log in once by hand and compare it: ssh {host}"),
    (r"Permission denied|Too many authentication failures|No supported authentication", LoginRefused,
     "{host} does not let you in", _ADVICE_LOGIN),
    (r"Could not resolve hostname", RuntimeUnavailable,
     "there is no machine called {name}, or no network", "check the name and your network, e.g. the VPN"),
    (r"Connection refused", RuntimeUnavailable,
     "{name} is there, but takes no ssh connections", "check the name and the port (-p in HPC_SSH, or ~/.ssh/config)"),
    (r"timed out|No route to host|Network is unreachable|not responding|Broken pipe", RuntimeUnavailable,
     "{name} cannot be reached", "check your network, e.g. the VPN"),
    (r"Connection (closed|reset)|Connection to \S+ closed|kex_exchange_identification", RuntimeUnavailable,
     "{name} closed the connection", "try again; if it goes on, ask its administrators"),
)  # fmt: skip


def failure(lines: Sequence[str], host: str) -> RuntimeUnavailable:
    """What ssh's last lines mean, as our error. `host` is what ssh was given.

    >>> failure(["kim@login: Permission denied (publickey)."], "kim@login").message
    'kim@login does not let you in'
    """
    text = "\n".join(lines)
    for pattern, kind, message, hint in _FAILURES:
        if re.search(pattern, text):
            names = {"host": host, "name": host.rpartition("@")[2]}
            return kind(message.format(**names), hint=hint.format(**names))
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return RuntimeUnavailable(f"ssh to {host} failed: {last.strip()}", hint=f"by hand: ssh {host}")
