"""Site profiles build on each other."""

from __future__ import annotations

from typing import Any

import pytest

from hpc.core.errors import UsageError
from hpc.core.site import merge, resolve

PROFILES: dict[str, dict[str, Any]] = {
    "slurm": {"scheduler": "slurm", "gres": "gpu", "env": {"A": "1"}, "setup": ["one"]},
    "dgx": {"extends": "slurm", "gres": "gpu:a100", "env": {"B": "2"}},
    "mine": {"extends": "dgx", "env": {"A": "9"}, "setup": ["two"]},
    "a": {"extends": "b"},
    "b": {"extends": "c"},
    "c": {"extends": "a"},
    "self": {"extends": "self"},
}


def test_profile_without_extends_is_itself() -> None:
    assert resolve("slurm", PROFILES.__getitem__) == PROFILES["slurm"]


def test_descendant_replaces_values_and_merges_tables() -> None:
    assert resolve("mine", PROFILES.__getitem__) == {
        "scheduler": "slurm",
        "gres": "gpu:a100",
        "env": {"A": "9", "B": "2"},
        "setup": ["two"],
    }


def test_resolving_leaves_the_profiles_as_they_were() -> None:
    before = {name: {**table} for name, table in PROFILES.items()}
    env = PROFILES["slurm"]["env"]
    resolve("mine", PROFILES.__getitem__)
    assert before == PROFILES
    assert env == {"A": "1"}


@pytest.mark.parametrize(("name", "circle"), [("a", "a -> b -> c -> a"), ("self", "self -> self")])
def test_circle_is_shown(name: str, circle: str) -> None:
    with pytest.raises(UsageError, match=circle) as caught:
        resolve(name, PROFILES.__getitem__)
    assert caught.value.hint


def test_merge_replaces_a_value_by_a_table_and_back() -> None:
    base: dict[str, Any] = {"a": 1, "b": {"x": 1}}
    merge(base, {"a": {"y": 2}, "b": 3})
    assert base == {"a": {"y": 2}, "b": 3}


def test_merge_copies_tables() -> None:
    base: dict[str, Any] = {}
    over = {"env": {"A": "1"}}
    merge(base, over)
    merge(base, {"env": {"A": "2"}})
    assert over == {"env": {"A": "1"}}
