"""
Which rows are taken: those held out, a seeded subset, a mixture of sources by weight, and a share of older data.

Each row has a place in a seeded order that depends on itself alone: rows that are added move few others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hpc.inside.table import ALIVE, DROPPED, HELD_OUT, Table

_BITS = 16


def quotas(counts: Sequence[int], weights: Sequence[float], total: int | None) -> list[int]:
    """How many rows to take of each source, so that the mixture has these weights and no row is taken twice.

    >>> quotas([100, 100], [3, 1], None), quotas([100, 100], [3, 1], 40), quotas([7], [1], None)
    ([100, 33], [30, 10], [7])
    >>> quotas([20, 20, 20], [1, 1, 1], 10), quotas([20, 20], [1, 2], 1)  # what is over goes to the largest remainders
    ([4, 3, 3], [0, 1])
    """
    whole = sum(weights)
    most = min((count * whole / weight for count, weight in zip(counts, weights, strict=True) if weight), default=0)
    size = int(most + 1e-9) if total is None else min(int(most + 1e-9), total)
    shares = [size * weight / whole for weight in weights]
    wanted = [min(count, int(share + 1e-9)) for count, share in zip(counts, shares, strict=True)]
    nearest = sorted(range(len(wanted)), key=lambda source: wanted[source] - shares[source])
    for source in nearest[: size - sum(wanted)]:
        wanted[source] += 1
    return wanted


def replayed(rows: int, available: int, share: float) -> int:
    """How many older rows go with so many new ones, to be this share of all.

    >>> replayed(90, 100, 0.1), replayed(90, 5, 0.1)
    (10, 5)
    """
    return min(available, round(rows * share / (1 - share)))


def counted(table: Table, groups: Any, count: int) -> list[int]:
    """The rows to train on of each group; `groups`: file -> its group, or -1."""
    import numpy as np

    found = np.zeros(count, dtype=np.int64)
    for start, block in table.blocks():
        group = groups[block["file"]]
        alive = (table.fate[start : start + len(block)] == ALIVE) & (group >= 0)
        found += np.bincount(group[alive], minlength=count)[:count]
    return [int(n) for n in found]


def hold_out(table: Table, groups: Any, rows: int) -> None:
    """Hold out the first so many rows, in the seeded order, of group 0."""
    limit = _limit(table, groups, 0, rows)
    for start, block in table.blocks():
        fate = table.fate[start : start + len(block)]
        fate[(fate == ALIVE) & (groups[block["file"]] == 0) & (block["rank"] < limit)] = HELD_OUT


def choose(table: Table, groups: Any, wanted: Sequence[int]) -> Iterator[int]:
    """The rows of each group that are not among its first so many in the seeded order; each is dropped."""
    import numpy as np

    limits = np.array([_limit(table, groups, group, rows) for group, rows in enumerate(wanted)], dtype=np.uint64)
    for start, block in table.blocks():
        group = groups[block["file"]]
        fate = table.fate[start : start + len(block)]
        (over,) = np.nonzero((fate == ALIVE) & (group >= 0) & (block["rank"] >= limits[group]))
        fate[over] = DROPPED
        yield from (start + over).tolist()


def _limit(table: Table, groups: Any, group: int, rows: int) -> Any:
    """The rank below which lie the first so many rows of the group; found in two passes, in little memory."""
    import numpy as np

    bins = np.zeros(1 << _BITS, dtype=np.int64)
    shift = np.uint64(64 - _BITS)

    def ranks() -> Iterator[Any]:
        for start, block in table.blocks():
            alive = table.fate[start : start + len(block)] == ALIVE
            yield block["rank"][alive & (groups[block["file"]] == group)]

    for found in ranks():
        bins += np.bincount((found >> shift).astype(np.int64), minlength=len(bins))
    upto = np.cumsum(bins)
    if rows >= upto[-1]:
        return np.uint64(2**64 - 1)
    last = int(np.searchsorted(upto, rows, side="right"))
    inside = np.sort(np.concatenate([found[(found >> shift) == last] for found in ranks()]))
    return inside[rows - int(upto[last] - bins[last])]
