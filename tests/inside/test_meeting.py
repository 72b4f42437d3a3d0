"""The ranks of one job: told by the first, which waits for them, and hears why one fails."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from hpc.core.errors import HpcError
from hpc.inside import meeting
from hpc.inside.meeting import Meeting


def ranks(folder: Path, world: int = 3) -> list[Meeting]:
    return [Meeting(folder / "ranks-7-0", rank, world) for rank in range(world)]


def test_each_task_knows_its_rank_and_each_start_has_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"ranks": 8}))
    found = meeting.of(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    assert (found.world, found.folder) == (8, tmp_path / "ranks-7-1")
    (tmp_path / "config.json").write_text(json.dumps({"resources": {"nodes": 2}}))
    assert meeting.of(tmp_path, {"SLURM_JOB_ID": "7"}).world == 1


def test_they_do_what_the_first_says_and_it_waits_for_them(tmp_path: Path) -> None:
    first, *others = ranks(tmp_path)
    heard = []

    def work(one: Meeting) -> None:
        heard.append(one.told(20)["what"])
        one.done()

    threads = [threading.Thread(target=work, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    first.tell(what="build")
    first.wait(lambda: False)
    assert heard == ["build", "build"]
    assert not first.is_over()
    first.over()
    assert others[0].is_over()


def test_the_reason_of_one_is_the_reason_of_all(tmp_path: Path) -> None:
    first, second, _ = ranks(tmp_path)
    second.fail(HpcError("no memory", hint="take less"))
    second.look()  # its own is no news
    with pytest.raises(HpcError, match=r"rank 1 on .*: no memory") as caught:
        first.wait(lambda: False)
    assert caught.value.hint == "take less"


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    first, second, _ = ranks(tmp_path)
    with pytest.raises(HpcError, match="heard nothing of the first one"):
        second.told(0)
    with pytest.raises(HpcError, match="ended by the scheduler"):
        first.wait(lambda: True)
    first.over()
    with pytest.raises(HpcError, match="the first one has ended"):
        second.told(20)
    second.until_over(0)


def test_one_alone_meets_nobody(tmp_path: Path) -> None:
    (alone,) = ranks(tmp_path, world=1)
    alone.tell(what="x")
    alone.wait(lambda: True)
    alone.over()
    assert list(tmp_path.iterdir()) == []
