"""Places on the shared file system: never more holders than places, and a dead holder's is free again."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from hpc.node import slots
from hpc.node.slots import slot


def test_never_more_holders_than_places(tmp_path: Path) -> None:
    holders, most, done = [0], [0], []
    lock, both = threading.Lock(), threading.Barrier(2, timeout=60)  # each waits for the holder of the other place

    def work() -> None:
        with slot(tmp_path / "slots", 2):
            with lock:
                holders[0] += 1
                most[0] = max(most[0], holders[0])
            both.wait()
            time.sleep(0.05)
            with lock:
                holders[0] -= 1
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(done), most[0]) == (6, 2)
    assert list((tmp_path / "slots").iterdir()) == []


def test_place_of_a_dead_holder_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slot-0").touch()
    os.utime(tmp_path / "slot-0", (1, 1))
    with slot(tmp_path, 1):
        assert (tmp_path / "slot-0").stat().st_mtime > 1


def test_kept_place_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_LOOK_S", 0.01)
    asked = []
    with slot(tmp_path, 1) as keep:

        def waiting() -> bool:
            asked.append(1)
            os.utime(tmp_path / "slot-0", (1, 1))  # as if it had been held for long
            keep()
            return len(asked) < 12

        with slot(tmp_path, 1, waiting):
            assert len(asked) == 12, "it gave up waiting, and never got the place"


def test_no_limit_and_a_folder_that_cannot_be_written_hold_nothing_up(tmp_path: Path) -> None:
    with slot(tmp_path / "none", 0):
        assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with slot(tmp_path / "file", 3):
        pass
