"""What was read and why rows were dropped: counted by reason, and each named with its file and line in a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hpc.inside.table import Table


class Drops:
    """Written as rows are dropped, in the order of the work."""

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        self.counts: Counter[str] = Counter()
        self.files = list(files)
        self.units = ["line"] * len(files)
        """What the records of each file are numbered by."""
        self._out = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Drops:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()

    def where(self, file: int, number: int) -> str:
        """
        >>> with Drops(Path("/dev/null"), ["a.jsonl"]) as drops:
        ...     drops.where(0, 7)
        'a.jsonl line 7'
        """
        return f"{self.files[file]} {self.units[file]} {number}"

    def record(self, file: int, number: int, reason: str, like: str = "") -> None:
        """One record that is left out; `like`: the one that it repeats."""
        self.counts[reason] += 1
        told = {"record": self.where(file, number), "reason": reason, **({"like": like} if like else {})}
        self._out.write(json.dumps(told, ensure_ascii=False) + "\n")

    def where_is(self, table: Table, row: int) -> str:
        """File and line of one row of the table."""
        record = table.record(row)
        return self.where(int(record["file"]), int(record["number"]))

    def row(self, table: Table, row: int, reason: str, like: int | None = None) -> None:
        """One row of the table, by its number there."""
        record = table.record(row)
        same = self.where_is(table, like) if like is not None else ""
        self.record(int(record["file"]), int(record["number"]), reason, same)

    def words(self) -> str:
        """The most frequent reasons."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common(5)) or "none"
