"""
Rows to train on that hold something of the held-out rows: they share an n-gram of words, in any case and punctuation.

What many rows to train on share is a phrase of theirs (a fixed instruction, say), and counts for nothing.
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
"""An n-gram of more rows than this is a phrase. GPT-3's authors counted so, too."""


def find(table: Table, n: int, workers: Workers) -> Iterator[int]:
    """The rows to train on that share an n-gram of words with a held-out row, in order."""
    import numpy as np

    held_out = [grams for _, grams, _ in workers.map(_grams, _tasks(table, HELD_OUT, n, None))]
    known = np.unique(np.concatenate(held_out)) if held_out else np.zeros(0, dtype=np.uint64)
    if not len(known):
        return
    hits = table.folder / "hits.bin"
    rows_with = np.zeros(len(known), dtype=np.int64)
    with open(hits, "wb") as out:
        for rows, grams, owners in workers.map(_grams, _tasks(table, ALIVE, n, known)):
            pairs = np.unique(np.stack([rows[owners], np.searchsorted(known, grams)], axis=1), axis=0)
            rows_with += np.bincount(pairs[:, 1], minlength=len(known))
            out.write(pairs.astype(np.int64).tobytes())
    last = -1
    with open(hits, "rb") as file:
        while len(pairs := np.fromfile(file, dtype=np.int64, count=2 << 16).reshape(-1, 2)):
            for row in pairs[rows_with[pairs[:, 1]] <= _PHRASE][:, 0].tolist():
                if row != last:
                    last = row
                    yield row


def _tasks(table: Table, fate: int, n: int, known: Any) -> Iterator[tuple[Path, Any, Any, Any, int, Any]]:
    for rows, offsets, lengths in table.tasks([fate]):
        yield table.text, rows, offsets, lengths, n, known


def _grams(task: tuple[Path, Any, Any, Any, int, Any]) -> tuple[Any, Any, Any]:
    """(rows, the n-grams of theirs that are known, for each the place of its row among the rows)."""
    import numpy as np

    path, rows, offsets, lengths, n, known = task
    said = [words.words(languages.said(json.loads(line)["messages"])) for line in texts(path, offsets, lengths)]
    grams, starts = words.ngrams(said, n)
    owners = np.repeat(np.arange(len(said)), np.diff(starts))
    if known is not None:
        found = known[np.minimum(np.searchsorted(known, grams), len(known) - 1)] == grams
        grams, owners = grams[found], owners[found]
    return rows, grams, owners
