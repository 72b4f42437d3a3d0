"""An image from the shared file system to the node's own disk, once: hashed while it is copied, and only whole.

    <scratch>/hpc-<uid>/images/<sha256>.sif       the copy, complete by construction
                               <sha256>.json      its size and times when it was made: a changed copy is noticed
                               <sha256>.lock      flock: exclusive while it is made or removed, shared while it is used
                               <sha256>.part      a copy in the making; what a killed job left is overwritten

Each user has a folder of their own: a copy that another user owns could be changed after it was checked.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hpc.core import rundir
from hpc.core.errors import HpcError, VerificationFailed
from hpc.node.deaf import deaf
from hpc.node.slots import slot

if TYPE_CHECKING:  # imported where a copy is made: a start that finds one is not to wait for it
    from concurrent.futures import Future, ThreadPoolExecutor

_CHUNK = 1 << 20
"""Bytes that are hashed at once."""
_PIECE = 4 << 20
"""Bytes that are copied at once."""
_AHEAD = 256 << 20
"""Bytes that the copying may be ahead of the hashing: they are read back from memory, not from the disk."""
_FLUSH_S = 0.1
_GB = 1 << 30
_SPARE = _GB
"""Bytes that stay free on the node's disk."""
_TELL_S = 1.0

Tell = Callable[[int, int, float], None]
"""(bytes copied, bytes in all, bytes per second); (0, 0, 0) while another process of this node copies it."""


@dataclass(frozen=True, kw_only=True)
class Staging:
    """What the node needs to know to stage one image."""

    source: str
    sha256: str
    target: str
    slots: str = ""
    """A folder on the shared file system that limits how many nodes copy this image at once."""
    readers: int = 0
    """That many; 0: no limit."""
    limit_gb: int
    """Staged images of one user on one node, GiB; the longest unused go first."""

    @property
    def asked(self) -> str:
        """What the last `hpc reset` left for the nodes: a copy that knows another word is made anew."""
        if not self.slots:
            return ""
        with suppress(FileNotFoundError):
            return again(Path(self.slots)).read_text(encoding="utf-8")
        return ""


def slots_of(cache: Path, sha256: str) -> Path:
    """The folder on the shared file system with the turns of an image's readers."""
    return cache / "staging" / sha256[:16]


def again(slots: Path) -> Path:
    """The word of `hpc reset` for the nodes' copies of an image."""
    return slots.with_suffix(".again")


def target_of(scratch: str, sha256: str, uid: int) -> str:
    """Where the image lies on the node; known before the job runs."""
    return f"{scratch}/hpc-{uid}/images/{sha256}.sif"


def in_words(name: str, total: int, rate: float) -> str:
    """What a Tell means to a person, beside the share that is done.

    >>> in_words("train", 9, 1.1e9), in_words("train", 9, 0), in_words("train", 0, 0)
    ('1.1 GB/s', 'waits for its turn to copy train', 'another job of this node copies train')
    """
    if not total:
        return f"another job of this node copies {name}"
    return f"{rate / 1e9:.1f} GB/s" if rate else f"waits for its turn to copy {name}"


@contextmanager
def staged(wish: Staging, tell: Tell = lambda done, total, rate: None) -> Iterator[Path]:
    """The image on the node's disk, kept from removal for as long as the block runs.

    VerificationFailed where the source is not what was planned with; HpcError where there is no room.
    """
    target = Path(wish.target)
    _own_folder(target.parent)
    with open(target.with_suffix(".lock"), "a") as lock:
        asked = wish.asked
        if _whole(target) and not _whole(target, asked):
            _forget(target)
        _lock(lock, fcntl.LOCK_SH, tell)
        while not _whole(target):
            _lock(lock, fcntl.LOCK_EX, tell)
            if not _whole(target):  # nobody made it while we waited
                _copy(wish, asked, target, tell)
            _lock(lock, fcntl.LOCK_SH, tell)  # not atomic: another may have removed it in between, so look again
        with suppress(OSError):
            os.utime(target.with_suffix(".json"))  # the time of last use
        yield target


def _lock(lock: IO[str], kind: int, tell: Tell) -> None:
    """Lock it, and tell where that must wait."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        tell(0, 0, 0.0)
        fcntl.flock(lock, kind)


def _own_folder(folder: Path) -> None:
    """Make <scratch>/hpc-<uid>/images, private; VerificationFailed where another user was there first."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for one in (folder.parent, folder):
        with suppress(FileExistsError):
            one.mkdir(mode=0o700)
        if one.is_symlink() or one.stat().st_uid != os.getuid():
            raise VerificationFailed(
                f"{one} belongs to another user, who could change the images in it",
                hint="ask an administrator to remove it, or choose another `scratch` in the site profile",
            )


def _whole(target: Path, asked: str | None = None) -> bool:
    """True where the copy is there and has not been touched since it was made (its ctime cannot be set back).

    `asked`: and is no older than that word of `hpc reset`.
    """
    made = rundir.read_json(target.with_suffix(".json"))
    try:
        return made is not None and made["stat"] == _stat(target) and asked in (None, made.get("asked", ""))
    except FileNotFoundError:
        return False


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _copy(wish: Staging, asked: str, target: Path, tell: Tell) -> None:
    source = Path(wish.source)
    part = target.with_suffix(".part")
    with suppress(FileNotFoundError):
        target.unlink()
    part.unlink(missing_ok=True)
    try:
        with open(source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _make_room(target.parent, size, wish.limit_gb * _GB)
            with slot(Path(wish.slots), wish.readers, _waiting(size, tell)) as keep:

                def tell_and_keep(done: int, total: int, rate: float) -> None:
                    keep()
                    tell(done, total, rate)

                found = _copy_hashed(file.fileno(), part, size, tell_and_keep)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HpcError(f"no room for {source.name} in {target.parent}", hint="`scratch` names the disk") from error
        raise HpcError(f"{source} cannot be staged: {error.strerror}", hint="do all nodes see it?") from error
    except BaseException:  # Ctrl-C
        part.unlink(missing_ok=True)
        raise
    if found != wish.sha256:
        part.unlink(missing_ok=True)
        raise VerificationFailed(
            f"{source} is not the image that was planned with: its sha256 is {found}, not {wish.sha256}",
            hint="if it was replaced on purpose, submit again; else restore or rebuild it",
        )
    os.rename(part, target)
    made = {"stat": _stat(target), "source": wish.source, "asked": asked}
    rundir.write_text(target.with_suffix(".json"), json.dumps(made))


def _waiting(size: int, tell: Tell) -> Callable[[], bool]:
    """Tells, about once a second, that nothing is copied yet."""
    told = [0.0]

    def waiting() -> bool:
        if time.monotonic() - told[0] >= _TELL_S:
            told[0] = time.monotonic()
            tell(0, size, 0.0)
        return True

    return waiting


def _copy_hashed(source: int, part: Path, size: int, tell: Tell) -> str:
    """Copy and hash in one pass; the sha256 of what was written.

    The kernel copies, and beside it what has been written is hashed while it is still in memory; the disk is kept busy
    meanwhile, so that little is left to wait for at the end.
    """
    digest, buffer, hashed = hashlib.sha256(), memoryview(bytearray(_CHUNK)), 0

    def hash_up_to(end: int) -> None:
        nonlocal hashed
        while hashed < end:
            count = os.preadv(target.fileno(), [buffer[: end - hashed]], hashed)
            if not count:
                raise OSError(errno.EIO, f"{part.name} was cut")
            digest.update(buffer[:count])
            hashed += count

    hashing, flushing, last_flush = _over(), _over(), time.monotonic()
    done, started, told = 0, time.monotonic(), 0.0
    with open(part, "w+b", buffering=0) as target, _helper_thread() as hasher, _helper_thread() as flusher:
        while count := _copy_some(source, target, done):
            done += count
            if hashing.done() or done - hashed > _AHEAD:
                hashing.result()
                hashing = hasher.submit(hash_up_to, done)
            now = time.monotonic()
            if flushing.done() and now - last_flush >= _FLUSH_S:
                flushing.result()
                flushing, last_flush = flusher.submit(os.fdatasync, target.fileno()), now
            if now - told >= _TELL_S or done == size:
                told = now
                tell(done, size, done / max(now - started, 1e-6))
        hashing.result()
        hash_up_to(done)
        flushing.result()
        os.fsync(target.fileno())
    return digest.hexdigest()


def _copy_some(source: int, target: FileIO, offset: int) -> int:
    """Some bytes from there on; how many, 0 at the end."""
    try:
        return os.sendfile(target.fileno(), source, offset, _PIECE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    chunk = os.pread(source, _PIECE, offset)  # a file system whose files the kernel cannot send
    view = memoryview(chunk)
    while view:  # a raw write may take a part only
        view = view[target.write(view) :]
    return len(chunk)


def _over() -> Future[None]:
    """Work that is done already."""
    from concurrent.futures import Future

    future: Future[None] = Future()
    future.set_result(None)
    return future


@contextmanager
def _helper_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread beside the copying one, which takes no signal."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as helper:
        with deaf():
            helper.submit(int)  # the pool starts its thread with its first work
        yield helper


def _make_room(folder: Path, size: int, limit: int) -> None:
    """Remove the longest unused images, never one in use, until this one fits under the limit and on the disk."""
    for candidate in sorted(folder.glob("*.json"), key=lambda p: _look(p)[0]):
        used = sum(_look(p)[1] for p in folder.glob("*.sif"))
        if used + size <= limit and _free(folder) >= size + _SPARE:
            return
        _forget(candidate.with_suffix(".sif"))
    if _free(folder) < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _look(path: Path) -> tuple[float, int]:
    """Last use in s and size in bytes; zeros where another job has removed it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0.0, 0
    return found.st_mtime, found.st_size


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _forget(image: Path) -> None:
    """Remove a copy, unless a job runs from it."""
    with open(image.with_suffix(".lock"), "a") as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        image.with_suffix(".json").unlink(missing_ok=True)
        image.unlink(missing_ok=True)
