"""`hpc --via HOST COMMAND`: the same command on the login node, by the laptop's own ssh."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from hpc.core.errors import Interrupted, RuntimeUnavailable, UsageError
from hpc.login import ssh, steps

CALLED = "HPC_CALLED_BY_SSH"
"""Set for the command on the login node: it ends when the connection does."""
_NO_FOLDER, _NO_HPC = 121, 127
SSH_FAILED = 255
_GOODBYE = re.compile(r"Connection to \S+ closed\.\s*")  # ssh says it after each command on a terminal


@dataclass(frozen=True)
class Place:
    """A folder of a login node, as the laptop's ssh reaches it."""

    host: str
    """HOST or USER@HOST."""
    folder: str = ""
    """Relative to the home folder there; empty: that one."""

    def as_user(self, name: str) -> Place:
        """UsageError where it is no plain word: ssh would take one that begins with - for an option."""
        return replace(self, host=f"{steps.checked('--login', name)}@{self.host.rpartition('@')[2]}")

    def command(self) -> str:
        """How a person writes a command for it."""
        return f"hpc --via {shlex.quote(self.host + (':' + self.folder if self.folder else ''))}"


def place(text: str, env: Mapping[str, str]) -> Place:
    """[USER@]HOST[:FOLDER]; HPC_LOGIN where no user is named, HPC_VIA_FOLDER where no folder. UsageError: neither.

    >>> place("kim@login:proj", {})
    Place(host='kim@login', folder='proj')
    >>> place("kim@[fe80::1]", {"HPC_VIA_FOLDER": "~/proj"})
    Place(host='kim@fe80::1', folder='proj')
    """
    found = re.fullmatch(r"((?:[^:\[\]]*@)?)(\[[^\]]+\]|[^:\[\]@]+)(?::(.*))?", text, re.DOTALL)
    if not found or re.search(r"\s|^-|@-", found[1] + found[2]):  # ssh would take what begins with - for an option
        raise UsageError(f"'{text}' names no login node", hint="write --via [USER@]HOST[:FOLDER]")
    folder = found[3] or env.get("HPC_VIA_FOLDER", "")
    there = Place(found[1] + found[2].strip("[]"), re.sub(r"^~(/+|$)", "", folder))
    return there.as_user(env["HPC_LOGIN"]) if env.get("HPC_LOGIN") and not found[1] else there


def take(argv: Sequence[str], env: Mapping[str, str]) -> tuple[Place | None, list[str]]:
    """The place that --via names, or HPC_VIA, and the arguments without it. None: the command is for this machine."""
    text, rest = env.get("HPC_VIA", ""), list(argv)
    end = rest.index("--") if "--" in rest else len(rest)
    found = next((i for i, word in enumerate(rest[:end]) if word.partition("=")[0] == "--via"), None)
    if found is None:
        named = any(not word.startswith("-") for word in rest)  # `hpc --help` needs no login node
        return (place(text, env) if text and named else None), rest
    _, given, text = rest.pop(found).partition("=")
    if not given:
        if found == len(rest):
            raise UsageError("--via needs a login node", hint="write --via [USER@]HOST[:FOLDER]")
        text = rest.pop(found)
    return (place(text, env) if text else None), rest


def remote(argv: Sequence[str], folder: str, env: Mapping[str, str]) -> str:
    """The command line that ssh hands to the user's shell there: hpc with these arguments, in this folder.

    A login shell of bash sets PATH, and what its files print goes to stderr. hpc is the one of PATH or of HPC_REMOTE.
    """
    named = env.get("HPC_REMOTE") or "hpc"
    program = f'"$HOME"/{_quoted(named[2:])}' if named.startswith("~/") else _quoted(named)
    script = f"cd -- {_quoted(folder)} 2>/dev/null || exit {_NO_FOLDER}; " if folder else ""
    script += f"command -v {program} >/dev/null || exit {_NO_HPC}; "
    script += f"HPC_VIA= {CALLED}=1 exec {program} {' '.join(map(_quoted, argv))} >&3 3>&-"
    outer = 'exec bash -lc "$0" 3>&1 >&2'
    return f"exec bash -c {shlex.quote(outer)} {shlex.quote(script)}"


def _quoted(word: str) -> str:
    r"""For bash within single quotes of any shell: nothing is left in it that sh, csh or fish would change there.

    >>> print(_quoted("a.b=c"), _quoted("it's $(id)!"), _quoted("한"), _quoted(""))
    a.b=c $'it\047s \044\050id\051\041' $'\355\225\234' $''
    """
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 _@%+=:,./-"
    return "$'" + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in os.fsencode(word)) + "'"


def run(there: Place, argv: Sequence[str]) -> int:
    """Run it there with this terminal, or these pipes; its exit code. RuntimeUnavailable where ssh cannot."""
    terminal = all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    command = remote(argv, there.folder, os.environ)
    process = ssh.start([*ssh.program(os.environ), "-t" if terminal else "-T", there.host, command])
    said = ssh.Said(process, show=lambda line: not _GOODBYE.fullmatch(line))
    with _left_to(process) as interrupted:
        code = process.wait()
    if interrupted() and code == SSH_FAILED:
        raise Interrupted("interrupted", hint="jobs that were submitted go on")
    return outcome(code, said.end(), there)


@contextmanager
def _left_to(process: subprocess.Popen[bytes]) -> Iterator[Callable[[], bool]]:
    """Signals are ssh's: the terminal sends it Ctrl-C as well (True afterwards), the others are passed on."""
    heard = []

    def pass_on(number: int, frame: object) -> None:
        process.send_signal(number)

    def note(number: int, frame: object) -> None:
        heard.append(number)

    handlers = {signal.SIGINT: note, signal.SIGTERM: pass_on, signal.SIGHUP: pass_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield lambda: bool(heard)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_the_caller() -> None:
    """On the login node, called by ssh: end when the connection does, and not when the job does (Linux, prctl(2))."""
    import ctypes

    del os.environ[CALLED]
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGHUP)


def outcome(code: int, lines: Sequence[str], there: Place) -> int:
    """The exit code of hpc there. Our own errors where ssh failed, or there is no such folder or no hpc."""
    if code == SSH_FAILED:
        raise ssh.failure(lines, there.host)
    if code == _NO_FOLDER:
        raise UsageError(
            f"{there.host} has no folder '{there.folder}', or you may not enter it",
            hint="it is what follows the colon of --via, or HPC_VIA_FOLDER",
        )
    if code == _NO_HPC:
        raise RuntimeUnavailable(
            f"there is no hpc on {there.host}: not on the PATH of a login shell",
            hint="install it there (pip install hpc-batch), or say where it is: HPC_REMOTE=/path/to/hpc",
        )
    return code if code >= 0 else 128 - code
