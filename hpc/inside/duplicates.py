"""
Rows that are there twice: exactly, by their hash, or nearly, by MinHash. The first in the data's order stays.

Two rows are near duplicates where they share so large a part of their 3-grams of words. MinHash finds candidates
(rows whose signatures agree in one of the bands), of which fewer than one in a thousand is missed, and each is then
compared word by word: nothing below the threshold is dropped. Rows that agree in a band are compared with the first of
them; those that are left, which may share a long text with it, with one another, by their rarest n-grams. All sorting
is done on parts of bounded size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hpc.inside import languages, words
from hpc.inside.parallel import Workers
from hpc.inside.table import DROPPED, Table, texts

WORDS = 3
"""Words of an n-gram."""

_PERMUTATIONS = 128
_SEED = 42
_FACTOR = 0x9E3779B97F4A7C15
_BANDS = ((0.9, 16), (0.8, 25), (0.7, 32), (0.55, 42), (0.0, 64))
"""From this similarity on: so many bands of a signature."""
LEAST = 0.5
"""Below this similarity two conversations that have little in common look alike to a band."""
_DEVIATIONS = 3.5
"""A signature may say less than the similarity is, by so many standard deviations of what it says."""
_PART = 1 << 18
"""So many rows are sorted at once."""
_PAIRS = 256
_TINY = 1e-9
_TOGETHER, _ROW = 1 << 22, 1 << 11
"""So many bytes of rows that are left of a band are compared with one another at once (each counts as no less than so
many),"""
_HOLDERS = 256
"""and of those that hold the same rare n-gram so many."""


def signatures(rows: Sequence[Sequence[str]], threshold: float) -> tuple[Any, Any]:
    """(for each row a hash of each band, the low byte of each of its minima) of rows given as words."""
    import numpy as np
    from rensa import RMinHash

    grams, offsets = words.ngrams(rows, WORDS)
    if not len(rows):
        return np.zeros((0, _bands(threshold)), np.uint64), np.zeros((0, _PERMUTATIONS), np.uint8)
    made = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets.astype(np.uint64), _PERMUTATIONS, _SEED)
    minima = np.array(made.to_rows(), dtype=np.uint64)
    bands = _bands(threshold)
    width = _PERMUTATIONS // bands
    hashes = np.zeros((len(rows), bands), dtype=np.uint64)
    for k in range(width):
        hashes = (hashes ^ minima[:, k : k + width * bands : width][:, :bands]) * np.uint64(_FACTOR)
        hashes ^= hashes >> np.uint64(29)
    return hashes, minima.astype(np.uint8)


def _bands(threshold: float) -> int:
    return next(bands for least, bands in _BANDS if threshold >= least)


class Signatures:
    """The signatures of all rows, on disk."""

    def __init__(self, folder: Path, threshold: float) -> None:
        self.threshold = threshold
        self._files = [folder / f"band-{band}.bin" for band in range(_bands(threshold))]
        self._minima = folder / "minima.bin"
        self._out = [open(path, "wb") for path in (*self._files, self._minima)]  # noqa: SIM115

    def add(self, made: tuple[Any, Any], until: int) -> None:
        """Those of the next rows, the first so many."""
        for out, column in zip(self._out, made[0][:until].T, strict=False):
            out.write(column.tobytes())
        self._out[-1].write(made[1][:until].tobytes())

    def finish(self) -> None:
        for out in self._out:
            out.close()

    def bands(self) -> Iterator[Any]:
        """The hashes of one band after the other, as a function that reads those of some rows."""
        import numpy as np

        for path in self._files:
            with open(path, "rb") as file:
                yield lambda start, count, file=file: np.frombuffer(
                    os.pread(file.fileno(), 8 * count, 8 * start), dtype=np.uint64
                )

    def alike(self, left: Any, right: Any) -> Any:
        """How similar the rows of each pair are, by their signatures."""
        import numpy as np

        with open(self._minima, "rb") as file:

            def minima(rows: Any) -> Any:
                data = b"".join(os.pread(file.fileno(), _PERMUTATIONS, int(row) * _PERMUTATIONS) for row in rows)
                return np.frombuffer(data, dtype=np.uint8).reshape(len(rows), _PERMUTATIONS)

            return np.concatenate(
                [
                    (minima(left[at : at + 4096]) == minima(right[at : at + 4096])).mean(axis=1)
                    for at in range(0, len(left), 4096)
                ]
                or [np.zeros(0)]
            )


def exact(table: Table) -> Iterator[tuple[int, int]]:
    """(row, the earlier one that it repeats), each dropped in the table."""
    for part in range(parts := _parts(table.count)):
        for first, rows in _groups(_digests(table, part, parts)):
            for row in rows:
                table.fate[row] = DROPPED
                yield row, first


def near(table: Table, found: Signatures, workers: Workers) -> Iterator[tuple[int, int]]:
    """(row, an earlier one that it nearly repeats), each dropped in the table."""
    import numpy as np

    least = found.threshold - _DEVIATIONS * (found.threshold * (1 - found.threshold) / _PERMUTATIONS) ** 0.5
    for read in found.bands():
        for part in range(parts := _parts(table.count)):
            groups = list(_groups(_column(table, read, part, parts)))
            pairs = np.array([(first, row) for first, rows in groups for row in rows], dtype=np.int64).reshape(-1, 2)
            likely = found.alike(pairs[:, 0], pairs[:, 1]) >= least
            pairs = pairs[likely]
            pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
            for (first, row), share in zip(pairs, _shares(table, pairs, workers), strict=True):
                if share >= found.threshold:
                    table.fate[row] = DROPPED
                    yield int(row), int(first)
            left = ([row for row in rows if table.fate[row] != DROPPED] for _, rows in groups)
            for row, first in _among(table, [rows for rows in left if len(rows) > 1], found.threshold, workers):
                if DROPPED not in (table.fate[first], table.fate[row]):
                    table.fate[row] = DROPPED
                    yield row, first


def _parts(count: int) -> int:
    return 1 + count // _PART


def _digests(table: Table, part: int, parts: int) -> tuple[Any, Any]:
    """(hashes, rows) of the rows whose hash falls into the part."""
    import numpy as np

    hashes, rows = [], []
    for start, block in table.blocks():
        mine = block["digest"] % np.uint64(parts) == part
        (chosen,) = np.nonzero((table.fate[start : start + len(block)] != DROPPED) & mine)
        hashes.append(block["digest"][chosen])
        rows.append(start + chosen)
    return _joined(hashes, np.uint64), _joined(rows, np.int64)


def _column(table: Table, read: Any, part: int, parts: int) -> tuple[Any, Any]:
    import numpy as np

    hashes, rows = [], []
    for start in range(0, table.count, 1 << 16):
        count = min(1 << 16, table.count - start)
        column = read(start, count)
        mine = column % np.uint64(parts) == part
        (chosen,) = np.nonzero((table.fate[start : start + count] != DROPPED) & mine)
        hashes.append(column[chosen])
        rows.append(start + chosen)
    return _joined(hashes, np.uint64), _joined(rows, np.int64)


def _joined(found: list[Any], dtype: Any) -> Any:
    import numpy as np

    return np.concatenate(found) if found else np.zeros(0, dtype=dtype)


def _groups(column: tuple[Any, Any]) -> Iterator[tuple[int, list[int]]]:
    """(first row, the others) of the rows with the same hash, where there are others."""
    import numpy as np

    hashes, rows = column
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], rows[order]
    again = np.concatenate([[False], hashes[1:] == hashes[:-1]]) if len(hashes) else np.zeros(0, dtype=bool)
    starts = np.nonzero(again & ~np.concatenate([[False], again[:-1]]))[0] if len(hashes) else []
    for start in starts:
        end = start
        while end < len(again) and again[end]:
            end += 1
        yield int(rows[start - 1]), rows[start:end].tolist()


def _among(table: Table, groups: list[list[int]], threshold: float, workers: Workers) -> list[tuple[int, int]]:
    """(row, an earlier one of its group that it nearly repeats), in order."""
    import numpy as np

    tasks: list[list[tuple[int, int]]] = [[]]
    free = _TOGETHER
    for number, rows in enumerate(groups):
        sizes = np.maximum(table.records(rows)["length"].astype(np.int64), _ROW)
        for piece in np.split(np.arange(len(rows)), np.nonzero(np.diff((np.cumsum(sizes) - 1) // _TOGETHER))[0] + 1):
            size = int(sizes[piece].sum())
            if size > free:
                tasks.append([])
                free = _TOGETHER
            free -= size
            tasks[-1] += ((number, rows[at]) for at in piece)
    given = ((table.text, table.records([row for _, row in task]), [n for n, _ in task], threshold) for task in tasks)
    found = zip(tasks, workers.map(_repeats, given), strict=True)
    return sorted((task[row][1], task[first][1]) for task, pairs in found for row, first in pairs)


def _repeats(task: tuple[Path, Any, list[int], float]) -> list[tuple[int, int]]:
    """
    (row, an earlier one), both as places in the task, that nearly repeat one another and are of the same group.

    Two rows that share so much have one of their rarest n-grams in common: of the longer row as many as it need not
    share, and one more; of the shorter, which comes first, as many as a row of its own length need not, and one more.
    """
    import numpy as np

    path, records, groups, least = task
    grams, offsets = words.ngrams([_words(text) for text in texts(path, records["offset"], records["length"])], WORDS)
    holder = np.repeat(np.arange(len(groups)), np.diff(offsets))
    apart = (np.array(groups, dtype=np.uint64) + np.uint64(1)) * np.uint64(_FACTOR)  # n-grams of a group are its own
    numbers = np.unique(grams ^ apart[holder], return_inverse=True)[1]
    count = len(numbers) + 1
    holder, numbers = np.divmod(np.unique(holder * count + numbers), count)  # each of a row's once
    rarest = np.lexsort((np.bincount(numbers)[numbers], holder))
    held = [row.tolist() for row in np.split(numbers[rarest], np.searchsorted(holder, np.arange(1, len(groups))))]
    sets = [set(row) for row in held]
    holders: dict[int, list[int]] = {}
    pairs: list[tuple[int, int]] = []
    for row in sorted(range(len(held)), key=lambda row: len(held[row])):
        size = len(held[row])
        rare = held[row][: size - math.ceil(least * size - _TINY) + 1]
        for other in {other for gram in rare for other in holders.get(gram, ())}:
            shared = len(sets[row] & sets[other])
            if shared >= least * (size + len(sets[other]) - shared):
                pairs.append((max(row, other), min(row, other)))
        for gram in rare[: size - math.ceil(2 * least / (1 + least) * size - _TINY) + 1]:
            if len(known := holders.setdefault(gram, [])) < _HOLDERS:
                known.append(row)
    return pairs


def _shares(table: Table, pairs: Any, workers: Workers) -> Iterator[float]:
    """How large a part of their n-grams the rows of each pair share."""
    blocks = (pairs[at : at + _PAIRS] for at in range(0, len(pairs), _PAIRS))
    tasks = ((table.text, table.records(block[:, 0].tolist()), table.records(block[:, 1].tolist())) for block in blocks)
    for shares in workers.map(_compare, tasks):
        yield from shares


def _compare(task: tuple[Path, Any, Any]) -> list[float]:
    path, left, right = task
    firsts, others = (texts(path, side["offset"], side["length"]) for side in (left, right))
    pairs = zip(map(cache(_grams), firsts), map(_grams, others), strict=True)  # many rows have the same first
    return [len(a & b) / max(1, len(a | b)) for a, b in pairs]


def _grams(text: bytes) -> set[tuple[str, ...]]:
    """The n-grams of a row; a shorter one is one n-gram, and one without words, such as signs alone, has none."""
    found = _words(text)
    return set(zip(*(found[k:] for k in range(WORDS)), strict=False)) if len(found) >= WORDS else {tuple(found)} - {()}


def _words(text: bytes) -> list[str]:
    return words.words(languages.said(json.loads(text)["messages"]))
