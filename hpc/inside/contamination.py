"""
Rows to train on that hold something of the held-out rows: they share an n-gram of words, in any case and punctuation.

What many rows to train on share with several held-out rows is a phrase of both (a fixed instruction, say), and is
told apart: a single held-out row that many repeat is no phrase.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.inside import languages, words
from hpc.inside.parallel import Workers
from hpc.inside.table import ALIVE, HELD_OUT, Table, texts

_PHRASE = 10
"""An n-gram of more rows to train on than this, and of more than one held-out row, is a phrase."""


def find(table: Table, n: int, workers: Workers) -> Iterator[tuple[int, bool]]:
    """The rows to train on that share an n-gram of words with a held-out row, in order; True: phrases alone."""
    import numpy as np

    held_out = [grams for _, grams, _ in workers.map(_grams, _tasks(table, HELD_OUT, n, None))]
    known, held_by = np.unique(np.concatenate(held_out or [np.zeros(0, np.uint64)]), return_counts=True)
    if not len(known):
        return
    hits = table.folder / "hits.bin"
    rows_with = np.zeros(len(known), dtype=np.int64)
    with open(hits, "wb") as out:
        for rows, grams, owners in workers.map(_grams, _tasks(table, ALIVE, n, known)):
            pairs = np.stack([rows[owners], np.searchsorted(known, grams)], axis=1)
            rows_with += np.bincount(pairs[:, 1], minlength=len(known))
            out.write(pairs.astype(np.int64).tobytes())
    phrase = (rows_with > _PHRASE) & (held_by > 1)
    found = np.zeros(table.count, dtype=np.uint8)
    with open(hits, "rb") as file:
        while len(pairs := np.fromfile(file, dtype=np.int64, count=2 << 16).reshape(-1, 2)):
            found[pairs[:, 0]] |= 1
            found[pairs[~phrase[pairs[:, 1]], 0]] |= 2
    for row in np.nonzero(found)[0].tolist():
        yield row, bool(found[row] == 1)


def _tasks(table: Table, fate: int, n: int, known: Any) -> Iterator[tuple[Path, Any, Any, Any, int, Any]]:
    for rows, offsets, lengths in table.tasks([fate]):
        yield table.text, rows, offsets, lengths, n, known


def _grams(task: tuple[Path, Any, Any, Any, int, Any]) -> tuple[Any, Any, Any]:
    """(rows, the n-grams of theirs that are known, once a row, for each the place of its row among the rows)."""
    import numpy as np

    path, rows, offsets, lengths, n, known = task
    said = [words.words(languages.said(json.loads(line)["messages"])) for line in texts(path, offsets, lengths)]
    grams, starts = words.ngrams(said, n)
    owners = np.repeat(np.arange(len(said)), np.diff(starts))
    if known is not None:
        found = known[np.minimum(np.searchsorted(known, grams), len(known) - 1)] == grams
        grams, owners = grams[found], owners[found]
    order = np.lexsort((grams, owners))
    grams, owners = grams[order], owners[order]
    first = np.ones(len(grams), dtype=bool)
    first[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
    return rows, grams[first], owners[first]
