"""Make a virtual environment that holds exactly what requirements files pin; nothing happens where it is so already.

    python3 tools/venv.py FOLDER REQUIREMENTS... [--editable DIR] [--on VENV]

PIP_ARGS in the environment goes to pip, e.g. --extra-index-url=URL for an index with CPU builds of torch.

Standard library only, and it must work on a bare Debian: its python3 comes without pip and without what
`python3 -m venv` wants for one. An ordinary user can still fetch Debian's own pip, as a file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PIP = "pip==26.3"
STAMP = "made"
"""In the folder, written last: the digest of all that went in. A venv without it was interrupted, and is made anew."""
EVERY_S = 5
"""Between two lines of progress."""


class Problem(Exception):
    """It cannot be made; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a virtual environment from pinned requirements.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("requirements", nargs="+", type=Path)
    parser.add_argument("--editable", type=Path, metavar="DIR", help="a project to install as a link to its source")
    parser.add_argument("--on", type=Path, metavar="VENV", help="one of this Python whose packages are seen too")
    options = parser.parse_args(argv)
    try:
        make(options.folder.absolute(), options.requirements, options.editable, options.on)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the next call makes it anew", file=sys.stderr)
        return 130
    return 0


def make(folder: Path, requirements: Sequence[Path], editable: Path | None, on: Path | None = None) -> None:
    begin = time.monotonic()
    with locked(folder):
        wanted = digest(folder, requirements, editable) + (f" on {(on / STAMP).read_text()}" if on is not None else "")
        stamp = folder / STAMP
        if stamp.is_file() and stamp.read_text() == wanted:
            say(folder, "up to date")
            return
        if folder.exists():
            say(folder, "its requirements have changed, or it is half made: made anew")
            shutil.rmtree(folder)
        with tempfile.TemporaryDirectory() as scratch:
            create(folder, Path(scratch))
        files = [word for path in requirements for word in ("-r", str(path))]
        files += ["--no-deps"] if on is not None else []
        pip_install(folder, files, count=sum(map(pins, requirements)))
        if editable is not None:  # what it builds with is among the requirements, so nothing unpinned comes in
            pip_install(folder, ["--no-deps", "--no-build-isolation", "-e", str(editable)], count=1)
        if on is not None:  # behind its own packages, which count
            (theirs,), (ours,) = (at.absolute().glob("lib/python3*/site-packages") for at in (on, folder))
            (ours / "on.pth").write_text(f"{theirs}\n")
        stamp.write_text(wanted)
    say(folder, f"ready after {time.monotonic() - begin:.0f} s")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time: the second of two waits, and then finds it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(folder, "another process is making it: waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(folder: Path, requirements: Sequence[Path], editable: Path | None) -> str:
    """Of all that it is made of; its own path too, which is written into its programs."""
    parts = [str(folder), sys.version, os.path.realpath(sys.executable), PIP]
    try:
        parts += [path.read_text() for path in requirements]
        if editable is not None:
            parts += [str(editable.absolute()), (editable / "pyproject.toml").read_text()]
    except OSError as error:
        raise Problem(f"{error.filename}: {error.strerror}") from error
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def pins(path: Path) -> int:
    return sum("==" in line.partition("#")[0] for line in path.read_text().splitlines())


def create(folder: Path, scratch: Path) -> None:
    """The empty venv, and pip in it."""
    say(folder, f"Python {sys.version.split()[0]} from {sys.executable}")
    bundled = importlib.util.find_spec("ensurepip") is not None
    run([sys.executable, "-m", "venv", *([] if bundled else ["--without-pip"]), str(folder)])
    wheel = [] if bundled else [f"{debian_pip(folder, scratch)}/pip"]
    run([python(folder), *(wheel or ["-m", "pip"]), "install", "-q", *pip_args(), PIP])


def debian_pip(folder: Path, scratch: Path) -> Path:
    """The wheel of Debian's package python3-pip-whl: installed, or fetched as a file, which needs no root."""
    root = Path("/")
    wheel = "usr/share/python-wheels/pip-*.whl"
    if not any(root.glob(wheel)):
        say(folder, f"{sys.executable} has no pip: fetching Debian's")
        root = scratch / "root"
        for index in ([], private_apt(scratch)):  # the machine's own package lists may be missing
            if index:
                quiet(["apt-get", *index, "update"], scratch)
            if quiet(["apt-get", *index, "download", "python3-pip-whl"], scratch):
                quiet(["dpkg-deb", "-x", *map(str, scratch.glob("*.deb")), str(root)], scratch)
                break
    found = sorted(root.glob(wheel))
    if not found:
        raise Problem(
            f"{sys.executable} can make no venv with pip in it, and Debian's pip cannot be fetched:"
            " apt-get install python3-venv, or name another Python: make PYTHON=/path/to/python3"
        )
    return found[-1]


def private_apt(scratch: Path) -> list[str]:
    """Options that let apt-get work with the machine's sources in a folder of ours."""
    for name in ("lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    settings = {
        "Dir::State::lists": scratch / "lists",
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::sourceparts": "/etc/apt/sources.list.d",
        "APT::Sandbox::User": "root",  # where root runs this: its other user cannot enter the folder
        "APT::Update::Post-Invoke::": "",
        "Acquire::Languages": "none",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def quiet(command: Sequence[str], cwd: Path) -> bool:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Problem(f"{shlex.join(command)} failed:\n{done.stdout.strip()}")


def pip_install(folder: Path, arguments: Sequence[str], count: int) -> None:
    """pip, with a line every few seconds: most of its time it says nothing at all, or far too much."""
    # not compiled: Python does that at the first import, and most modules never see one
    command = [python(folder), "-u", "-m", "pip", "install", "--no-compile", "--progress-bar", "off",
               "--no-input", *pip_args(), *arguments]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=pump, args=(process, lines), daemon=True)
    reader.start()
    (packages,) = folder.glob("lib/python3*/site-packages")
    there = len(list(packages.glob("*.dist-info")))
    log: list[str] = []
    collected, now, told = 0, "looking", time.monotonic()
    try:
        while reader.is_alive() or not lines.empty():
            with contextlib.suppress(queue.Empty):
                log.append(lines.get(timeout=0.5))
                word, _, rest = log[-1].strip().partition(" ")
                if word == "Collecting":
                    collected += 1
                    now = f"{collected} of {count}: {rest.split()[0]}"
                elif word == "Downloading" and ".metadata" not in rest:
                    now = f"{collected} of {count}: {rest.rsplit('/', 1)[-1]}"
                elif word == "Installing":
                    now = ""
            if time.monotonic() - told >= EVERY_S:
                told = time.monotonic()
                unpacked = len(list(packages.glob("*.dist-info"))) - there
                say(folder, f"downloading {now}" if now else f"unpacking, {unpacked} of {count} packages")
    except BaseException:  # Ctrl-C, mostly
        process.terminate()
        process.wait()
        raise
    if process.wait():
        raise Problem(f"pip failed:\n{''.join(log[-15:]).rstrip()}")


def pump(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)


def pip_args() -> list[str]:
    return shlex.split(os.environ.get("PIP_ARGS", ""))


def python(folder: Path) -> str:
    return str(folder / "bin" / "python")


def say(folder: Path, text: str) -> None:
    print(f"{folder.parent.name}/{folder.name}: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
