"""Files over HTTP: a broken download goes on, what is not the file is refused, one of many jobs fetches."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.core import stale
from hpc.core.errors import VerificationFailed
from hpc.inside import transfer
from hpc.inside.transfer import Expected, Remote

from ..support.hub import Hub, serving

DATA = bytes(range(256)) * 4096 * 3
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        found.files["big"] = DATA
        yield found


def remote(hub: Hub, path: str = "big", **expected: object) -> Remote:
    return Remote(url=f"{hub.url}/{path}", expected=Expected(**expected), headers={"Authorization": "Bearer secret"})


def test_a_connection_that_breaks_is_gone_on_from(hub: Hub, tmp_path: Path) -> None:
    hub.cut["big"] = 1_000_000
    told: list[int] = []
    assert transfer.download(remote(hub, sha256=SHA), tmp_path / "big", told.append)
    assert (tmp_path / "big").read_bytes() == DATA
    assert hub.ranges("big") == ["", "bytes=1000000-"]
    assert told[-1] == len(DATA)
    assert [p.name for p in tmp_path.iterdir()] == ["big"], "nothing is left beside it"


def test_another_job_goes_on_where_a_stopped_one_ended(hub: Hub, tmp_path: Path) -> None:
    asked = iter([False, True])
    assert not transfer.download(remote(hub), tmp_path / "big", stop=lambda: next(asked, True))
    part = (tmp_path / "big.part").stat().st_size
    assert 0 < part < len(DATA)
    assert transfer.download(remote(hub, sha256=SHA), tmp_path / "big")
    assert hub.ranges("big") == ["", f"bytes={part}-"]


@pytest.mark.parametrize("tags", ["strong", "weak"])
def test_a_file_that_changed_meanwhile_is_fetched_anew(hub: Hub, tmp_path: Path, tags: str) -> None:
    hub.tags = tags
    asked = iter([False, True])
    transfer.download(remote(hub), tmp_path / "big", stop=lambda: next(asked, True))
    hub.files["big"] = new = b"new" * 1_000_000
    assert transfer.download(remote(hub), tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == new


@pytest.mark.parametrize("tags", ["strong", "weak", "none"])
def test_what_nobody_vouches_for_is_asked_for_again(
    hub: Hub, tmp_path: Path, tags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.tags, target = tags, tmp_path / "big"
    wanted = Remote(url=f"{hub.url}/big", renew=True)
    for _ in range(2):
        assert transfer.download(wanted, target)
    assert len(hub.asked) == (1 if tags == "none" else 2)
    hub.files["big"] = new = b"new"
    assert transfer.download(wanted, target)
    assert target.read_bytes() == (DATA if tags == "none" else new)
    assert ("its server does not tell" in capsys.readouterr().out) == (tags == "none")
    del hub.files["big"]
    assert transfer.download(wanted, target), "what is there is used"
    assert f"delete {target}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"big", "big.etag"}


@pytest.mark.parametrize("expected", [{"sha256": SHA}, {"git": hashlib.sha1(b"?").hexdigest()}, {"size": 7}])
def test_what_is_not_the_file_is_refused_and_thrown_away(hub: Hub, tmp_path: Path, expected: dict[str, object]) -> None:
    hub.wrong.add("big")
    with pytest.raises(VerificationFailed, match="big"):
        transfer.download(remote(hub, **expected), tmp_path / "big")
    assert not (tmp_path / "big").exists()
    assert not (tmp_path / "big.part").exists()


def test_an_empty_file_is_a_file(hub: Hub, tmp_path: Path) -> None:
    hub.files["empty"] = b""
    assert transfer.download(remote(hub, "empty", size=0), tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_the_token_goes_to_that_server_alone(hub: Hub, tmp_path: Path) -> None:
    transfer.download(remote(hub, "moved/big"), tmp_path / "big")
    first, second = (headers for _, headers in hub.asked)
    assert first["authorization"] == "Bearer secret"
    assert "authorization" not in second


def test_a_refusal_and_silence_are_told_apart(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_TRIES", 2)
    with pytest.raises(transfer.HttpError, match="404"):
        transfer.download(remote(hub, "none"), tmp_path / "none")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1: "):
        transfer.download(Remote(url="http://127.0.0.1:1/x"), tmp_path / "x")


def test_of_many_jobs_one_fetches(hub: Hub, tmp_path: Path) -> None:
    hub.pace_s = 0.005
    jobs = [
        threading.Thread(target=transfer.download, args=(remote(hub, sha256=SHA), tmp_path / "big")) for _ in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(hub.asked) == 1
    assert (tmp_path / "big").read_bytes() == DATA


def test_a_dead_jobs_lock_is_taken_over_and_a_living_ones_is_not(hub: Hub, tmp_path: Path) -> None:
    lock = tmp_path / "big.lock"
    lock.write_text("{}")
    stop = threading.Event()
    job = threading.Thread(target=transfer.download, args=(remote(hub), tmp_path / "big"), kwargs={"stop": stop.is_set})
    job.start()
    time.sleep(0.3)
    assert not hub.asked, "its owner may still be at work"
    old = time.time() - 1000
    os.utime(lock, (old, old))
    job.join(60)
    stop.set()
    assert (tmp_path / "big").exists()


def test_a_slow_transfer_keeps_its_lock(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two parts the lock grows old; each part makes it young before the other job looks at it again."""
    monkeypatch.setattr(transfer, "_TOUCH_S", 0.0)
    monkeypatch.setattr(transfer, "_WAIT_S", 0.01)
    hub.files["big"] = DATA[: 7 << 16]
    lock, free = tmp_path / "big.lock", stale.free
    turn, looked, parts = threading.Lock(), threading.Event(), [0]

    def look(place: Path, seconds: float) -> None:
        with turn:
            free(place, seconds)
        looked.set()

    def old() -> bool:
        try:
            return lock.stat().st_mtime < 1000
        except FileNotFoundError:  # all is there
            return False

    def after_part() -> None:
        deadline = time.monotonic() + 30
        while (is_old := old()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if parts[0]:
            turn.release()
        parts[0] += 1
        if parts[0] < 7 and not is_old:
            looked.clear()
            looked.wait(60)
            turn.acquire()
            os.utime(lock, (1, 1))

    monkeypatch.setattr(stale, "free", look)
    hub.after_part = after_part
    jobs = [threading.Thread(target=transfer.download, args=(remote(hub), tmp_path / "big")) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert (len(hub.asked), parts[0] >= 6) == (1, True), "each time that it was old"
    assert (tmp_path / "big").read_bytes() == hub.files["big"]


def test_the_rate_tells_what_is_left() -> None:
    said: list[str] = []
    rate = transfer.Rate(4_000_000, lambda done, total, text: said.append(text), "org/name")
    rate.of("a")(1_000_000)
    time.sleep(0.05)
    rate.of("a")(3_000_000)
    assert said[-1].startswith("org/name: 3.0 MB of 4.0 MB, ")
    assert said[-1].endswith(" left")
