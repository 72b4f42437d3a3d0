"""An image of 1 GB to the node's disk: once for all, as fast as the disk or the hash lets it, and then for nothing.

As a program it stages one image at a given moment and prints the seconds: one of several starts at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import Fact, Line, Pair, Part

from hpc.node.staging import Staging, staged, target_of

ROUNDS = 5
SIZE = 1 << 30
STARTS = 8
SLOWER = 1 / 0.9
"""At least 0.9 times the speed of the slower of the two."""
HIT_MS = 50.0
AT_ONCE = 1.2
_SOON_S = 1.0


def lines(rounds: int) -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="hpc-bench-", dir="/var/tmp") as folder:
        place = Path(folder)
        source = place / "image.sif"
        _write(source)
        digest = _sha256(source)
        taken: dict[str, list[float]] = {name: [] for name in ("stage", "cp", "hash", "hit", "one", "last")}
        copies = []
        for number in range(rounds + 1):
            found = {"hash": _timed(lambda: _sha256(source))}
            _warm(source, place)
            found["cp"] = _timed(lambda: _cp(source, place / "copy"))
            _warm(source, place)
            found["stage"] = _timed(lambda: _stage(source, digest, place / "scratch"))
            found["hit"] = _timed(lambda: _stage(source, digest, place / "scratch"))
            shutil.rmtree(place / "scratch")
            _warm(source, place)
            (found["one"],), _ = _at_once(1, source, digest, place / "scratch")
            _warm(source, place)
            several, made = _at_once(STARTS, source, digest, place / "scratch")
            found["last"] = max(several)
            if number:
                copies.append(made)
                for name, ms in found.items():
                    taken[name].append(ms)
    slower = max(("cp", "hash"), key=lambda name: statistics.median(taken[name]))
    names = {"cp": "cp, and its data on the disk (fsync)", "hash": "sha256 of the file, in a Python process"}
    yield Pair(
        what="staging an image of 1 GB", ms=taken["stage"], against=names.pop(slower), against_ms=taken[slower],
        goal=SLOWER,
    )  # fmt: skip
    ((name, words),) = names.items()
    yield Part(what=f"the faster of the two: {words}", ms=taken[name])
    yield Fact(
        what="the second start: it is there already",
        found=f"{sorted(taken['hit'])[rounds // 2]:.1f} ms",
        goal=f"≤ {HIT_MS:g} ms",
        met=max(taken["hit"]) <= HIT_MS,
    )
    yield Pair(
        what=f"{STARTS} starts at once, the last of them", ms=taken["last"], against="one start",
        against_ms=taken["one"], goal=AT_ONCE,
    )  # fmt: skip
    yield Fact(what=f"copies that {STARTS} starts at once make", found=str(max(copies)), goal="1", met=max(copies) == 1)


def _warm(source: Path, place: Path) -> None:
    """Let each side find what the other finds: an idle disk, and memory that has just been used.

    A virtual machine may have given free memory back to its host, and the next to need it pays for that.
    """
    _cp(source, place / "warm")


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1000


def _write(path: Path) -> None:
    """Data that no file system can make smaller."""
    with open(path, "wb") as file:
        for _ in range(SIZE >> 24):
            file.write(os.urandom(1 << 24))
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", source, target], check=True)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    target.unlink()


def _stage(source: Path, digest: str, scratch: Path) -> list[int]:
    """The bytes that were copied each time that progress was told; none, or zeros, where another copied it."""
    told: list[int] = []
    wish = Staging(source=str(source), sha256=digest, target=target_of(str(scratch), digest, os.getuid()), limit_gb=200)
    with staged(wish, lambda done, total, rate: told.append(done)):
        return told


def _at_once(count: int, source: Path, digest: str, scratch: Path) -> tuple[list[float], int]:
    """Milliseconds of each of some processes that start to stage at the same moment, and how many of them copied."""
    moment = time.time() + _SOON_S
    argv = [sys.executable, __file__, str(source), digest, str(scratch), str(moment)]
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    printed = [process.communicate()[0].split() for process in started]
    shutil.rmtree(scratch)
    return [float(ms) for ms, _ in printed], sum(copied == "copied" for _, copied in printed)


def _main(source: str, digest: str, scratch: str, moment: str) -> None:
    time.sleep(max(0.0, float(moment) - time.time()))
    begin = time.time()
    told = _stage(Path(source), digest, Path(scratch))
    print((time.time() - begin) * 1000, "copied" if any(told) else "found")


if __name__ == "__main__":
    _main(*sys.argv[1:])
