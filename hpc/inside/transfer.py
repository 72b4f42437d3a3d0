"""
Files over HTTP: resumed where they broke off, checked, and put in place whole. Standard library.

The hub's own client (2.4) throws a part away when its process ends; here it stays, and the next job goes on from it
with `Range` and `If-Range`. Many jobs may want the same file: one fetches it, the others wait for it. Where the lock
does not hold (a node that died, a file system without locks), the check of the content still does.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hpc.core import stale
from hpc.core.errors import VerificationFailed

_CHUNK = 1 << 20
_TRIES = 5
"""So often is a broken connection made anew without a byte between."""
_WAIT_S = 1.0
_STALE_S = 90.0
"""A lock that nobody touched for so long is a dead job's."""
_TOUCH_S = 5.0

Tell = Callable[[int], None]
"""Called with the number of bytes that are there now."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a file must be; each where it is known."""

    size: int | None = None
    sha256: str | None = None
    git: str | None = None
    """Its name in git: the sha1 of a header and the content."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """One file on a server."""

    url: str
    expected: Expected = Expected()
    headers: Mapping[str, str] | None = None
    """For that server alone: a redirection to another does not get them."""
    renew: bool = False
    """Where the file is there, ask whether it is another one by now: nothing says what it must be."""


class HttpError(Exception):
    """The server refuses."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status


def download(
    remote: Remote, target: Path, tell: Tell = lambda n: None, stop: Callable[[], bool] = lambda: False
) -> bool:
    """Fetch the file to `target`, if it isn't there or is to be renewed.

    False where `stop` asked to end before, with the part kept.
    VerificationFailed for what is not what was expected, HttpError for a refusal, OSError where nothing comes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    wanted = (lambda: False) if remote.renew else target.exists
    with _locked(target.with_name(f"{target.name}.lock"), wanted, stop) as touch:
        if target.exists() and not (remote.renew and not stop() and _changed(remote, target)):
            tell(target.stat().st_size)
            return True
        tries = 0
        while not stop():
            before = _size(part)
            touch()
            try:
                if _append(remote, part, tell, stop, touch):
                    verify(part, remote.expected, remote.url, touch)
                    os.replace(part, target)
                    if remote.renew:
                        os.replace(_tag(part), _tag(target))
                    _tag(part).unlink(missing_ok=True)
                    return True
            except VerificationFailed:
                part.unlink(missing_ok=True)
                raise
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise HttpError(error.code, str(error.reason)) from error
                failed: Exception = error
            except (OSError, http.client.HTTPException) as error:
                failed = error
            else:
                continue
            tries = 0 if _size(part) > before else tries + 1
            if tries == _TRIES:
                raise OSError(f"{_host(remote.url)}: {failed}") from failed
            time.sleep(min(2.0**tries * 0.1, 10))
    return False


def verify(path: Path, expected: Expected, name: str, touch: Callable[[], None] = lambda: None) -> None:
    """VerificationFailed where the file is not what was expected."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        raise VerificationFailed(
            f"{name} has {size} bytes, and should have {expected.size}", hint="it was changed on the way, or there"
        )
    for wanted, digest in (
        (expected.sha256, hashlib.sha256()),
        (expected.git, hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)),
    ):
        if wanted is None:
            continue
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                touch()
        if digest.hexdigest() != wanted:
            raise VerificationFailed(
                f"{name} is not the file that it should be: its {digest.name} is {digest.hexdigest()[:16]}…,"
                f" and should be {wanted[:16]}…",
                hint="it was broken on the way, or changed there; the part is thrown away: submit again",
            )


def _changed(remote: Remote, target: Path) -> bool:
    """Whether another file is there by now; where that cannot be told, the log says that the old one is used."""
    if not (tag := _read(_tag(target))):
        why = "its server does not tell whether it changed"
    else:
        request = _request(remote)
        request.add_header("If-None-Match", tag)
        try:
            with urllib.request.urlopen(request, timeout=60, context=_trusted()) as answer:
                length = answer.headers.get("Content-Length")
                return answer.headers.get("ETag") != tag or length not in (None, str(_size(target)))
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 304:
                return False
            why = str(error)
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(target.stat().st_mtime))
    print(f"{remote.url}: the copy of {day} is used ({why}); to fetch it anew, delete {target}", flush=True)
    return False


def _request(remote: Remote) -> urllib.request.Request:
    request = urllib.request.Request(remote.url, headers={"Accept-Encoding": "identity"})
    for name, value in (remote.headers or {}).items():
        request.add_unredirected_header(name, value)
    return request


def _append(remote: Remote, part: Path, tell: Tell, stop: Callable[[], bool], touch: Callable[[], None]) -> bool:
    """Fetch what is missing of the part; whether it is whole."""
    have = _size(part)
    if have and have == remote.expected.size:
        return True
    tag = _read(_tag(part))
    if have and not tag and remote.expected.size is None:
        have = 0  # nothing says that it is still the same file there
    request = _request(remote)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if tag and not tag.startswith("W/"):
            request.add_header("If-Range", tag)
    try:
        answer = urllib.request.urlopen(request, timeout=60, context=_trusted())
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            part.unlink(missing_ok=True)
            return False
        raise
    now = answer.headers.get("ETag") or ""
    if answer.status == 206 and now != tag and (now or tag.startswith("W/")):
        answer.close()
        part.unlink(missing_ok=True)  # another file is there by now
        return False
    with answer, open(part, "ab" if answer.status == 206 else "wb") as out:
        _tag(part).write_text(now)
        have = out.tell() if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        whole = have + int(length) if length else None
        while chunk := answer.read1(_CHUNK):  # what has come: a slow one must touch the lock too
            out.write(chunk)
            have += len(chunk)
            tell(have)
            touch()
            if stop():
                return False
    if whole is not None and have < whole:
        raise OSError(f"the connection ended after {have} of {whole} bytes")
    return True


@contextmanager
def _locked(lock: Path, there: Callable[[], bool], stop: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Be the only one that fetches a file, or wait until it is there. The block gets what keeps the lock."""
    mine = json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "time": time.time_ns()})
    while True:
        try:
            with os.fdopen(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as out:
                out.write(mine)
            break
        except FileExistsError:
            if there() or stop():
                yield lambda: None
                return
            with suppress(OSError):
                stale.free(lock, _STALE_S)
            time.sleep(_WAIT_S)
    last = time.monotonic()

    def touch() -> None:
        nonlocal last
        if time.monotonic() - last > _TOUCH_S:
            last = time.monotonic()
            with suppress(OSError):
                os.utime(lock)

    try:
        yield touch
    finally:
        if _read(lock) == mine:
            lock.unlink(missing_ok=True)


@cache
def _trusted() -> ssl.SSLContext:
    """The machine's certificates, and certifi's: an image may have none of its own."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _host(url: str) -> str:
    return url.split("/")[2] if "//" in url else url


class Rate:
    """How far several transfers are together, how fast, and how long it takes yet."""

    def __init__(self, total: int, tell: Callable[[float, float, str], None], name: str) -> None:
        self._total, self._tell, self._name = total, tell, name
        self._there: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._begin = time.monotonic()
        self._lock = threading.Lock()

    def of(self, file: str) -> Tell:
        """What to call as this file grows."""

        def tell(there: int) -> None:
            with self._lock:
                self._first.setdefault(file, there)
                self._there[file] = there
                done = sum(self._there.values())
                fetched = done - sum(self._first.values())
            rate = fetched / max(time.monotonic() - self._begin, 1e-3)
            total = max(self._total, done)
            left = f", {clock((total - done) / rate)} left" if rate > 0 and self._total else ""
            self._tell(done, total + 1, f"{self._name}: {size(done)} of {size(total)}, {size(rate)}/s{left}")

        return tell


def size(count: float) -> str:
    """Bytes in words.

    >>> size(999), size(1500), size(2.5e9)
    ('999 B', '1.5 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
