"""An image that runs from where it lies is, right before it is started, the one that was planned with.

What this cannot see is told in docs/adr/0011.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc.core import imagelock
from hpc.core.digest import sha256
from hpc.core.errors import HpcError, VerificationFailed


@dataclass(frozen=True, kw_only=True)
class InPlace:
    """What the node needs to know of an image on the shared file system."""

    path: str
    sha256: str
    stat: tuple[int, ...] = ()
    """How its file looked when its content was found to be that; it is read again where it looks otherwise."""


def check(image: InPlace, reading: Callable[[], None] = lambda: None) -> None:
    """VerificationFailed where the image is not what was planned with; `reading` is called before it is read."""
    path = Path(image.path)
    try:
        with open(path, "rb") as file:  # opening asks the file server; a stat alone may be told by an old memory
            if imagelock.look(file.fileno()) == tuple(image.stat):
                return
        reading()
        found = sha256(path)
    except OSError as error:
        raise HpcError(f"{path} cannot be read: {error.strerror}", hint="do all nodes see it?") from error
    if found != image.sha256:
        raise VerificationFailed(
            f"{path} is not the image that was planned with: its sha256 is {found}, not {image.sha256}",
            hint="if it was replaced on purpose, submit again; else restore or rebuild it",
        )
