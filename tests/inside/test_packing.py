"""Packing: every conversation whole and once, few rows, the same each time."""

from __future__ import annotations

import random
from typing import Any

from hpc.inside import packing
from hpc.inside.conversations import IGNORED


def rows(count: int, longest: int) -> list[dict[str, list[int]]]:
    lengths = random.Random(1)
    found = []
    for number in range(count):
        ids = [number + 1] * lengths.randint(2, longest)
        found.append({"input_ids": ids, "labels": list(ids)})
    return found


def test_every_conversation_is_there_once_and_whole() -> None:
    given = rows(200, 30)
    made = packing.packed(given, 64, seed=0)
    parts = []
    for row in made:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row[packing.LENGTHS]) <= 64
        start = 0
        for length in row[packing.LENGTHS]:
            ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
            assert labels == [IGNORED, *ids[1:]], "its first token is no answer to the one before"
            parts.append(ids)
            start += length
    assert sorted(parts) == sorted(row["input_ids"] for row in given)
    total = sum(len(row["input_ids"]) for row in given)
    assert total / (64 * len(made)) > 0.95, "hardly a token of padding is left"


def test_the_same_rows_are_packed_the_same_way_and_others_by_another_seed() -> None:
    given = rows(50, 30)
    first: Any = packing.packed(given, 64, seed=0)
    assert first == packing.packed(given, 64, seed=0)
    assert first != packing.packed(given, 64, seed=1)
