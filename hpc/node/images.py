"""Apptainer as a library: build, pull, sign, verify, look inside. Each call's exit code and result are checked.

spython is known here alone, and is used for what it answers reliably: the version and the labels. It calls a program
named `singularity`, so it gets one on its PATH. Its pull and build hide failures, so those are our own calls.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.errors import HpcError, RuntimeUnavailable, UsageError, VerificationFailed

ZSTD = ("--mksquashfs-args", "-comp zstd -Xcompression-level 3")
"""Five times faster than the default gzip, and hardly larger."""
_HEADER = 96
"""Bytes of the shortest that an image begins with, squashfs's."""
_WORK = "hpc-build-"
_YOUNG_S = 60
"""A workspace may be made, and not yet be held."""
_TELL_S = 5.0
_TAIL = 12
_AS_IT_IS = ("oras://", "library://", "shub://", "http://", "https://")
"""What is a SIF at its source is taken as it is, with its signatures; all else is converted."""
_PROBE = """
import importlib.metadata, json, platform
first_wins = reversed(list(importlib.metadata.distributions()))
found = {d.metadata["Name"].lower().replace("_", "-").replace(".", "-"): d.version for d in first_wins}
print(json.dumps({**found, "python": platform.python_version()}))
"""

Tell = Callable[[str], None]


def plausible(image: Path) -> bool:
    """Whether the file can be an image at all: of any kind that Apptainer starts, and no text, such as a web page."""
    with open(image, "rb") as file:
        head = file.read(4096)
    return len(head) >= _HEADER and b"\0" in head


@contextmanager
def workspace(folder: Path, need: int) -> Iterator[Path]:
    """A private folder below `folder` for the time of a build; HpcError where less than `need` bytes are free."""
    if folder.is_dir():
        _sweep(folder)
    refuse_full(folder, need)
    work = Path(tempfile.mkdtemp(prefix=_WORK, dir=folder))
    held = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        (work / "tmp").mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(held)


def _sweep(folder: Path) -> None:
    """Remove what builds of ours that were killed have left: nobody holds it any more."""
    for left in folder.glob(f"{_WORK}*"):
        with suppress(OSError):
            stat = left.stat()
            if stat.st_uid != os.getuid() or time.time() - stat.st_mtime < _YOUNG_S:
                continue
            held = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(held)


def refuse_full(folder: Path, need: int) -> None:
    """HpcError where a folder's disk has less than `need` bytes free; UsageError where it cannot be used."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} is no folder that you can write to", hint="--tmp and --to name others")
    free = shutil.disk_usage(folder).free
    if free < need:
        raise HpcError(
            f"{folder} has {free / 2**30:.1f} GiB free, and {need / 2**30:.1f} GiB are needed",
            hint="make room, or name another disk: --tmp for the work, --to for the image",
        )


def run(
    argv: Sequence[str], log: Path, tell: Tell, *, env: Mapping[str, str], cwd: Path, grows: Path | None = None
) -> int:
    """Run to the end with the output in a log; every few seconds tell its last line, and the size of what grows."""
    begin = told = time.monotonic()
    with open(log, "ab") as out:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(env), cwd=cwd,
            start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(0.2)
                if time.monotonic() - told >= _TELL_S:
                    told = time.monotonic()
                    tell(f"{told - begin:.0f} s: {_last(log)}{_size(grows)}")
        except BaseException:  # Ctrl-C, mostly: give it the time to clear away what it made
            for number in (signal.SIGTERM, signal.SIGKILL):  # to its children too: Apptainer alone may not heed it
                with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    os.killpg(process.pid, number)
                    process.wait(10)
                    break
            raise


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent is gone, even by SIGKILL: nobody would use what is being made.

    Apptainer loses this where it changes its user namespace; such a build ends when the next one sweeps its workspace.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _last(log: Path) -> str:
    lines = [line.strip() for line in rundir.tail(log) if line.strip()]
    return re.sub(r"^(\x1b\[\d+m|INFO:|\s)+|\x1b\[\d+m", "", lines[-1])[:100] if lines else "starting"


def _size(path: Path | None) -> str:
    try:
        return f" ({path.stat().st_size / 1e9:.2f} GB)" if path is not None else ""
    except OSError:
        return ""


@dataclass(frozen=True)
class Apptainer:
    """One container program, and where it may work."""

    program: str
    work: Path
    """A workspace; the logs are in it."""
    tell: Tell = lambda text: None

    @property
    def log(self) -> Path:
        return self.work / "log"

    def version(self) -> str:
        """What the program says of itself, e.g. `apptainer version 1.4.5`."""
        with _spython(self.program, self.work) as client:
            return str(client.version()).strip()

    def build(
        self, recipe: Path, part: Path, arguments: Mapping[str, str], secret: Mapping[str, str], authfile: Path | None
    ) -> None:
        """Build from a recipe, as an ordinary user; paths in its %files count from the recipe's folder."""
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        login = ["--authfile", str(authfile)] if authfile else []
        argv = ["build", "--force", *ZSTD, *login, *words, str(part), str(recipe)]
        self._make(argv, part, recipe.name, recipe.parent, secret)

    def pull(self, source: str, part: Path, secret: Mapping[str, str], authfile: Path | None) -> None:
        """Fetch an image. `secret` goes into the environment of the one call, never into its arguments."""
        login = ["--authfile", str(authfile)] if authfile else []
        if source.startswith(_AS_IT_IS):
            argv = ["pull", *login, str(part), source]
        else:
            argv = ["build", *ZSTD, *login, str(part), source]
        self._make(argv, part, source, self.work, secret)

    def _make(self, argv: Sequence[str], part: Path, what: str, cwd: Path, secret: Mapping[str, str]) -> None:
        env = {**os.environ, "APPTAINER_TMPDIR": str(self.work / "tmp"), **secret}
        env.setdefault("APPTAINER_CACHEDIR", str(self.work / "cache"))
        code = run([self.program, *argv], self.log, self.tell, env=env, cwd=cwd, grows=part)
        if code or not part.is_file():
            raise explain(what, rundir.tail(self.log), code)

    def sign(self, image: Path, key: Path) -> None:
        """Add a signature to the file. A key with a passphrase asks for it on the terminal."""
        stdin = None if sys.stdin.isatty() else subprocess.DEVNULL
        done = self._call("sign", "--key", str(key), str(image), stdin=stdin)
        if done.returncode:
            raise UsageError(
                f"{image.name} cannot be signed with {key}: {_fatal(done.stderr.splitlines())}",
                hint="the key is a private one in PEM: openssl genpkey -algorithm ed25519 -out private.pem",
            )

    def verify(self, image: Path, key: Path) -> None:
        """VerificationFailed where the image bears no good signature of this public key."""
        if not key.is_file():
            raise UsageError(
                f"there is no key {key}", hint="verify_key in the site profile, or --key, names a PEM file"
            )
        done = self._call("verify", "--key", str(key), str(image), stdin=subprocess.DEVNULL)
        if done.returncode:
            raise VerificationFailed(
                f"{image} bears no good signature of {key}: {_fatal(done.stderr.splitlines())}",
                hint=f"whoever has the private key signs it: hpc images sign {image.stem} --key private.pem",
            )

    def labels(self, image: Path) -> dict[str, str]:
        """The image's labels."""
        with _spython(self.program, self.work) as client:
            found = client.inspect(str(image))
        labels = (found.get("attributes") or {}).get("labels") if isinstance(found, dict) else None
        if not isinstance(labels, dict):  # on a failure it gives what run_command gave
            raise HpcError(f"{image} cannot be read as an image", hint="build or pull it again")
        return {str(k): str(v) for k, v in labels.items()}

    def versions(self, image: Path) -> dict[str, str]:
        """Package -> version of the Python inside; {} where it has none."""
        done = self._call("exec", "--containall", str(image), "python3", "-c", _PROBE, stdin=subprocess.DEVNULL)
        try:
            return dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else {}
        except (ValueError, IndexError):
            return {}

    def _call(self, *argv: str, stdin: int | None) -> subprocess.CompletedProcess[str]:
        argv = (self.program, "--silent", *argv) if argv[0] == "exec" else (self.program, *argv)
        return subprocess.run(argv, stdin=stdin, capture_output=True, text=True, errors="replace")


@contextmanager
def _spython(program: str, work: Path) -> Iterator[Any]:
    """spython's client, which finds our program under the only name that it knows."""
    from spython.main import get_client

    names = work / "bin"
    names.mkdir(exist_ok=True)
    link = names / "singularity"
    if not link.is_symlink():
        link.symlink_to(shutil.which(program) or program)
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{names}{os.pathsep}{path}"
    try:
        yield get_client(quiet=True)
    finally:
        os.environ["PATH"] = path


def explain(what: str, lines: Sequence[str], code: int) -> HpcError:
    """The error that a failed build or pull means, out of what it printed; `what` is a recipe or an address."""
    text = "\n".join(lines[-40:])
    asked = re.search(r"https?://([^/\"\s]+)", text)
    host = asked[1] if asked else re.sub(r"^\w[\w+-]*:(//)?", "", what).partition("/")[0]
    name = what.removesuffix(".def")
    thing = what if name == what else f"what {what} asks for"
    if re.search(r"no such host|dial tcp|connection refused|i/o timeout|network is unreachable|TLS handshake", text):
        way_out = (
            "pull it where it can be reached, or `docker save IMAGE -o x.tar` there, and bring the file:"
            " `hpc images pull NAME x.sif` or `hpc images pull NAME docker-archive:x.tar`"
        )
        if name != what:
            way_out = (
                "give the same command on a machine that reaches it, and bring the image:"
                f" `hpc images pull {name} {name}.sif`"
            )
        return RuntimeUnavailable(
            f"{host} cannot be reached from this machine: {_fatal(lines)}", hint=f"set HTTPS_PROXY; or {way_out}"
        )
    if re.search(r"no library client|remote has no", text):
        return RuntimeUnavailable(f"{what}: no image library is set up here", hint="`apptainer remote list`")
    if re.search(r"unauthorized|authentication required|denied:|403 \(?Forbidden|401", text, re.I):
        return UsageError(
            f"{host} does not give {thing} without a login, or not with this one",
            hint="write the API key into ~/.config/hpc/ngc.key, mode 0600; or for a pull name a login: --auth FILE",
        )
    if re.search(r"could not parse reference", text):
        return UsageError(f"{thing} is no address of an image: {_fatal(lines)}", hint="check its name, tag and digest")
    if re.search(r"manifest unknown|name unknown|not found: |404", text, re.I):
        return UsageError(f"{host} does not have {thing}: {_fatal(lines)}", hint="check its name, tag and digest")
    if re.search(r"no space left on device|quota exceeded", text, re.I):
        return HpcError(f"no room to make {what}", hint="--tmp and --to name disks with more room")
    shown = "\n  ".join(line for line in lines[-_TAIL:] if line.strip())
    as_root = "; as root many builds fail: try as an ordinary user" if os.getuid() == 0 else ""
    return HpcError(f"{what} failed with exit code {code}:\n  {shown}", hint=f"mend what it says above{as_root}")


def _fatal(lines: Sequence[str]) -> str:
    """The line that says why, without its colour and its FATAL."""
    told = [line for line in lines if re.search(r"FATAL|ERROR", line)] or [line for line in lines if line.strip()]
    text = re.sub(r"\x1b\[\d+m", "", told[-1]) if told else "it said nothing"
    return re.sub(r"^\s*(FATAL|ERROR)\s*:\s*", "", text).strip()
