"""A place that a dead process holds is freed, and never one that another process has taken meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc.core import stale


def test_a_place_that_another_takes_at_this_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, stat = tmp_path / "slot-0", Path.stat
    place.touch()
    os.utime(place, (1, 1))

    def look(path: Path, **options: bool) -> os.stat_result:
        found = stat(path, **options)
        if path == place:  # the dead one's is freed, and taken
            place.unlink()
            place.touch()
        return found

    monkeypatch.setattr(Path, "stat", look)
    stale.free(place, 90)
    assert os.listdir(tmp_path) == ["slot-0"]


def test_a_dead_ones_is_freed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("dead", "living")]
    for place in places:
        place.touch()
    os.utime(places[0], (1, 1))
    for place in (*places, tmp_path / "nobodys"):
        stale.free(place, 90)
    assert os.listdir(tmp_path) == ["living"]
