"""
The rows that are being prepared, on disk: their text in one file, and beside it a record of fixed size for each.

In memory is one byte a row, its fate; the rest is read in blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ALIVE, DROPPED, HELD_OUT = 0, 1, 2
"""The fate of a row; alive: to be trained on, as far as is known."""

_FIELDS = [
    ("offset", "<u8"),
    ("length", "<u4"),
    ("number", "<u8"),
    ("file", "<u4"),
    ("rank", "<u8"),
    ("digest", "<u8"),
]
"""Where its text is, its line, its file, its place in a seeded order, and the hash of its messages."""
_BLOCK = 1 << 16
_TASK = 1 << 20


class Table:
    """Written once from front to back, then read."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self.folder = folder
        self.text = folder / "rows.jsonl"
        self._dtype = np.dtype(_FIELDS)
        self._records = folder / "rows.bin"
        self._out = [open(self.text, "wb"), open(self._records, "wb")]  # noqa: SIM115
        self._offset = 0
        self.count = 0
        self.fate: Any = None
        """One of ALIVE, DROPPED, HELD_OUT for each row."""

    def add(self, file: int, lines: Sequence[bytes], numbers: Any, ranks: Any, digests: Any) -> None:
        """Further rows, of one file."""
        import numpy as np

        made = np.zeros(len(lines), dtype=self._dtype)
        made["length"] = lengths = np.fromiter(map(len, lines), dtype=np.uint64, count=len(lines))
        made["offset"] = self._offset + np.cumsum(lengths) - lengths
        made["number"], made["file"], made["rank"], made["digest"] = numbers, file, ranks, digests
        self._out[0].write(b"".join(lines))
        self._out[1].write(made.tobytes())
        self._offset += int(lengths.sum())
        self.count += len(lines)

    def finish(self) -> None:
        """No more rows come."""
        import numpy as np

        for out in self._out:
            out.close()
        self.fate = np.zeros(self.count, dtype=np.uint8)

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """(number of the first, records) of all rows, block by block."""
        import numpy as np

        with open(self._records, "rb") as file:
            for start in range(0, self.count, _BLOCK):
                yield start, np.fromfile(file, dtype=self._dtype, count=min(_BLOCK, self.count - start))

    def record(self, row: int) -> Any:
        """The record of one row."""
        import numpy as np

        with open(self._records, "rb") as file:
            data = os.pread(file.fileno(), self._dtype.itemsize, row * self._dtype.itemsize)
        return np.frombuffer(data, dtype=self._dtype)[0]

    def records(self, rows: Sequence[int]) -> Any:
        """The records of some rows."""
        import numpy as np

        size = self._dtype.itemsize
        with open(self._records, "rb") as file:
            data = b"".join(os.pread(file.fileno(), size, row * size) for row in rows)
        return np.frombuffer(data, dtype=self._dtype)

    def tasks(self, fates: Iterable[int]) -> Iterator[tuple[Any, Any, Any]]:
        """(numbers, offsets, lengths) of the rows with such a fate, about a megabyte of text at a time, in order."""
        import numpy as np

        wanted = np.isin(np.arange(3), list(fates))
        for start, block in self.blocks():
            (chosen,) = np.nonzero(wanted[self.fate[start : start + len(block)]])
            if not len(chosen):
                continue
            bounds = np.cumsum(block["length"][chosen].astype(np.int64)) // _TASK
            for part in np.split(chosen, np.nonzero(np.diff(bounds))[0] + 1):
                yield start + part, block["offset"][part], block["length"][part]


def texts(path: Path, offsets: Any, lengths: Any) -> list[bytes]:
    """The lines of some rows."""
    with open(path, "rb") as file:
        return [os.pread(file.fileno(), int(n), int(at)) for at, n in zip(offsets, lengths, strict=True)]
