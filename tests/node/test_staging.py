"""Staging: whole or not at all, once, and never an image in use is removed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.core.errors import HpcError, VerificationFailed
from hpc.node import staging
from hpc.node.staging import Staging, staged, target_of

SIZE = 9 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "shared" / "train.sif"
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE))
    return path


def wish(source: Path, tmp_path: Path, limit_gb: int = 10) -> Staging:
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    return Staging(
        source=str(source), sha256=sha256, target=target_of(str(tmp_path / "local"), sha256, 7), limit_gb=limit_gb
    )


class Told(list[tuple[int, int, float]]):
    """The progress that was told: empty where nothing was copied."""

    def __call__(self, done: int, total: int, rate: float) -> None:
        self.append((done, total, rate))


def test_first_use_copies_and_the_second_is_a_hit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, told = wish(source, tmp_path), Told()
    with staged(asked, told) as path:
        assert path.read_bytes() == source.read_bytes()
    assert told
    assert told[-1][1] == SIZE
    source.unlink()  # a hit does not even look at it
    again = Told()
    monkeypatch.setattr(staging.hashlib, "sha256", lambda: pytest.fail("it was read"))  # takes a second a GB
    begin = time.thread_time()
    with staged(asked, again) as path:
        assert path.stat().st_size == SIZE
    assert time.thread_time() - begin < 0.05
    assert again == []


def test_changed_source_is_refused_with_both_digests_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    source.write_bytes(os.urandom(SIZE))
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(VerificationFailed) as refused, staged(asked):
        pass
    assert refused.value.exit_code == 6
    assert asked.sha256 in refused.value.message
    assert found in refused.value.message
    assert [p.suffix for p in Path(asked.target).parent.iterdir()] == [".lock"]


def test_truncated_source_is_refused(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    os.truncate(source, SIZE // 2)
    with pytest.raises(VerificationFailed), staged(asked):
        pass


def overwrite(source: Path) -> None:
    with open(source, "r+b") as file:  # in place: the worst case
        file.seek(SIZE - 10)
        file.write(b"tampered!!")


def cut(source: Path) -> None:
    os.truncate(source, SIZE - 10)


def replace_by_rename(source: Path) -> None:
    other = source.with_name("other")
    other.write_bytes(os.urandom(SIZE))
    os.replace(other, source)


def in_the_middle(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Have it happen when a part of the source has been read."""
    real, calls = os.sendfile, []

    def sendfile(*words: int) -> int:
        calls.append(words)
        if len(calls) == 2:
            change()
        return real(*words)

    monkeypatch.setattr(staging.os, "sendfile", sendfile)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_source_that_changes_during_the_copy_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    asked = wish(source, tmp_path)
    in_the_middle(monkeypatch, lambda: change(source))
    with pytest.raises(VerificationFailed) as refused, staged(asked):
        pass
    assert asked.sha256 in refused.value.message
    assert [p.suffix for p in Path(asked.target).parent.iterdir()] == [".lock"]


def test_source_that_another_file_replaces_during_the_copy_is_the_one_that_was_planned_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wish(source, tmp_path)
    in_the_middle(monkeypatch, lambda: replace_by_rename(source))
    with staged(asked) as path:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == asked.sha256
    assert hashlib.sha256(source.read_bytes()).hexdigest() != asked.sha256


def test_file_system_whose_files_the_kernel_cannot_send(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sendfile(*words: int) -> int:
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(staging.os, "sendfile", sendfile)
    asked, told = wish(source, tmp_path), Told()
    with staged(asked, told) as path:
        assert path.read_bytes() == source.read_bytes()
    assert told[-1][:2] == (SIZE, SIZE)


def test_copying_waits_for_a_hash_that_is_far_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_AHEAD", 1)
    asked = wish(source, tmp_path)
    with staged(asked) as path:
        assert path.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("damage", ["truncate", "overwrite", "replace"])
def test_damaged_copy_is_noticed_and_made_again(source: Path, tmp_path: Path, damage: str) -> None:
    asked = wish(source, tmp_path)
    with staged(asked) as path:
        pass
    stat = path.stat()
    if damage == "truncate":
        os.truncate(path, 100)
    elif damage == "overwrite":
        with open(path, "r+b") as file:
            file.write(b"x")
    else:
        path.unlink()
        path.write_bytes(bytes(SIZE))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as somebody would who wants it unseen
    with staged(asked) as path:
        assert path.read_bytes() == source.read_bytes()


def _stage(asked: Staging, started: object, told: object) -> None:
    def tell(done: int, total: int, rate: float) -> None:
        told.put((os.getpid(), total))  # type: ignore[attr-defined]

    started.wait()  # type: ignore[attr-defined]
    with staged(asked, tell):
        pass


def test_eight_at_once_make_one_copy(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    context = multiprocessing.get_context("fork")
    started, told = context.Event(), context.Queue()
    workers = [context.Process(target=_stage, args=(asked, started, told)) for _ in range(8)]
    for worker in workers:
        worker.start()
    started.set()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    copied = set()
    while not told.empty():
        pid, total = told.get()
        copied |= {pid} if total else set()
    assert len(copied) == 1
    assert hashlib.sha256(Path(asked.target).read_bytes()).hexdigest() == asked.sha256


def _killed_in_the_middle(asked: Staging) -> None:
    def die(done: int, total: int, rate: float) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with staged(asked, die):
        pass


def test_kill_in_the_middle_frees_the_lock_and_leaves_no_half_image(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    worker = multiprocessing.get_context("fork").Process(target=_killed_in_the_middle, args=(asked,))
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
    assert not Path(asked.target).exists()
    assert Path(asked.target).with_suffix(".part").exists()
    with staged(asked) as path:
        assert path.read_bytes() == source.read_bytes()
    assert not path.with_suffix(".part").exists()


def _stops_in_the_middle(asked: Staging) -> None:
    with staged(asked, lambda done, total, rate: signal.pause()):
        pass


def test_who_waits_for_a_copy_makes_it_when_its_maker_is_killed(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    context = multiprocessing.get_context("fork")
    started, told = context.Event(), context.Queue()
    started.set()
    maker = context.Process(target=_stops_in_the_middle, args=(asked,))
    waiter = context.Process(target=_stage, args=(asked, started, told))
    part = Path(asked.target).with_suffix(".part")
    try:
        maker.start()
        deadline = time.monotonic() + 30
        while not part.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        waiter.start()
        assert told.get(timeout=60) == (waiter.pid, 0), "it tells that it waits"
        waiter.join(0.3)
        assert waiter.is_alive(), "it must wait while the maker lives"
        maker.kill()
        assert told.get(timeout=60) == (waiter.pid, SIZE)
        waiter.join(30)
        assert waiter.exitcode == 0
    finally:
        for process in (maker, waiter):
            if process.pid is not None:
                process.kill()
                process.join()
    assert hashlib.sha256(Path(asked.target).read_bytes()).hexdigest() == asked.sha256
    assert not part.exists()


def test_full_disk_is_said_and_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wish(source, tmp_path)
    monkeypatch.setattr(staging, "_free", lambda folder: SIZE - 1)
    with pytest.raises(HpcError, match=r"no room for train\.sif"), staged(asked):
        pass
    monkeypatch.undo()

    def full(source: int, part: Path, size: int, tell: object) -> str:
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "_copy_hashed", full)
    with pytest.raises(HpcError, match=r"no room for train\.sif"), staged(asked):
        pass
    assert [p.suffix for p in Path(asked.target).parent.iterdir()] == [".lock"]


def test_interrupted_copy_leaves_nothing_half_made(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)

    def leave(done: int, total: int, rate: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(asked, leave):
        pass
    assert [p.suffix for p in Path(asked.target).parent.iterdir()] == [".lock"]


def test_missing_source_is_said(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    source.unlink()
    with pytest.raises(HpcError, match="cannot be staged: No such file") as error, staged(asked):
        pass
    assert error.value.hint == "do all nodes see it?"


def image(tmp_path: Path, name: str) -> Staging:
    path = tmp_path / name
    path.write_bytes(os.urandom(SIZE))
    return wish(path, tmp_path)


def test_longest_unused_images_go_first_and_one_in_use_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, used, young, new = (image(tmp_path, n) for n in ("old", "used", "young", "new"))
    monkeypatch.setattr(staging, "_GB", SIZE)  # a limit of 3 is three of these images
    for number, one in enumerate((used, old, young)):
        with staged(one):
            pass
        os.utime(Path(one.target).with_suffix(".json"), (number, number))
    with staged(used):
        os.utime(Path(used.target).with_suffix(".json"), (0, 0))
        from dataclasses import replace

        with staged(replace(new, limit_gb=3)):
            there = {n for n, one in {"old": old, "used": used, "young": young}.items() if Path(one.target).exists()}
    assert there == {"used", "young"}


def test_copy_that_another_job_has_just_removed_is_no_error(tmp_path: Path) -> None:
    for name in ("a.json", "b.sif"):
        (tmp_path / name).symlink_to("gone")
    staging._make_room(tmp_path, 1, 0)
    assert not (tmp_path / "a.json").is_symlink()


def test_another_users_images_are_elsewhere(source: Path) -> None:
    assert target_of("/raid", "ab", 7) != target_of("/raid", "ab", 8)


def test_folder_is_the_users_alone(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    with staged(asked) as path:
        assert path.parent.parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_another_user_made_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = wish(source, tmp_path)
    Path(asked.target).parent.mkdir(parents=True)
    monkeypatch.setattr(staging.os, "getuid", lambda: 12345)
    with pytest.raises(VerificationFailed, match="belongs to another user"), staged(asked):
        pass


def test_an_image_is_kept_while_a_job_that_waited_for_it_runs(source: Path, tmp_path: Path) -> None:
    asked = wish(source, tmp_path)
    inside, leave = threading.Event(), threading.Event()

    def use() -> None:
        with staged(asked):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(60)
    staging._forget(Path(asked.target))
    assert Path(asked.target).exists()
    leave.set()
    thread.join()
    staging._forget(Path(asked.target))
    assert not Path(asked.target).exists()


def test_a_reset_has_the_copy_made_anew_once_unless_a_job_runs_from_it(source: Path, tmp_path: Path) -> None:
    asked = replace(wish(source, tmp_path), slots=str(tmp_path / "turns" / "slots"))
    (tmp_path / "turns").mkdir()

    def made() -> int:
        with staged(asked) as path:
            return path.stat().st_ino

    first = made()
    staging.again(Path(asked.slots)).write_text("one")
    with open(Path(asked.target).with_suffix(".lock")) as lock:  # a job that runs from it
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert made() == first
    keep = os.open(asked.target, os.O_RDONLY)  # so that its number is not given to the next one
    second = made()
    os.close(keep)
    assert second != first
    assert made() == second
