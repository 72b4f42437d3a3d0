"""NAME.lock.json beside NAME.sif: what the image is, what it was made of, and how its file looked when it was made.

A file that still looks so (size, times, inode; the change time cannot be set back) is known without reading it.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hpc.core import rundir
from hpc.core.errors import VerificationFailed

SCHEMA = "hpc.image/1"
_TOLD = frozenset(
    "python torch transformers trl peft jupyterlab tensorrt-llm tensorrt onnxruntime-genai nvidia-pytriton"
    " tritonclient".split()
)
"""The versions that a run's manifest quotes; the lock has all."""


@dataclass(frozen=True, kw_only=True)
class ImageLock:
    """One image, as it was when it was built, pulled or signed."""

    sha256: str
    size: int
    stat: tuple[int, ...] = ()
    made: str
    """built, pulled or signed."""
    source: str
    """The recipe's name, or the address that it came from."""
    recipe: str = ""
    """The digest of all that a build was made of; another one means that it is outdated."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name -> sha256 of the recipe, its requirements and its base image."""
    labels: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version, asked of the Python inside."""
    apptainer: str = ""
    signed: bool = False
    at: str = ""
    by: str = ""

    def told(self) -> dict[str, str]:
        """The few versions that people ask for."""
        return {name: version for name, version in sorted(self.versions.items()) if name in _TOLD}

    def untouched(self, image: Path) -> bool:
        """True where the file looks as it did when this was written."""
        return bool(self.stat) and self.stat == look(image)

    def refuse(self, image: Path, found: str) -> None:
        """VerificationFailed where `found` is not the digest that was recorded."""
        if found != self.sha256:
            raise VerificationFailed(
                f"{image} is not the image that {of(image).name} records: its sha256 is {found}, not {self.sha256}",
                hint=f"make it again: hpc images {'pull' if self.made == 'pulled' else 'build'} {image.stem} … --force",
            )


def of(image: Path) -> Path:
    """Where an image's lock lies."""
    return image.with_suffix(".lock.json")


def look(image: Path | int) -> tuple[int, ...]:
    """Size, times and inode of a path or an open file: what changes when the file does."""
    stat = os.stat(image)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def read(image: Path) -> ImageLock | None:
    """The lock of an image; None where it has none, or none of ours."""
    document = rundir.read_json(of(image))
    if document is None or document.get("schema") != SCHEMA:
        return None
    known = {f.name for f in fields(ImageLock)}
    values: dict[str, Any] = {k: v for k, v in document.items() if k in known}
    try:
        return ImageLock(**{**values, "stat": tuple(values.get("stat") or ())})
    except TypeError:  # a field that must be there is not
        return None


def write(image: Path, lock: ImageLock) -> None:
    """Record the lock for the file as it lies there now."""
    document = asdict(lock)
    document.update(
        schema=SCHEMA, size=image.stat().st_size, stat=look(image), by=f"{getpass.getuser()}@{socket.gethostname()}",
        at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )  # fmt: skip
    rundir.write_json(of(image), document, durable=True)


def renew(image: Path, lock: ImageLock) -> None:
    """Record how the file looks now: its content was found to be what the lock says, e.g. after it was moved."""
    document = rundir.read_json(of(image))
    if document is not None and not lock.untouched(image):
        with suppress(OSError):  # another user's image
            rundir.write_json(of(image), {**document, "stat": look(image)})


def digest(image: Path, hash_file: Callable[[Path], str]) -> str:
    """The image's sha256: out of its lock where the file is untouched, else computed, and compared with the lock."""
    lock = read(image)
    if lock is not None and lock.untouched(image):
        return lock.sha256
    found = hash_file(image)
    if lock is not None:
        lock.refuse(image, found)
    return found


def install(part: Path, image: Path) -> None:
    """Put a complete file in the place of an image in one step. Its lock is written next."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, image)
