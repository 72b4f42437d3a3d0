"""Files of records -> the table of rows that are good by themselves, read by many processes, in the files' order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpc.core.errors import HpcError, UsageError
from hpc.inside import judging, languages, records, sources
from hpc.inside.drops import Drops
from hpc.inside.duplicates import Signatures
from hpc.inside.judging import Judged, Rules
from hpc.inside.parallel import Workers
from hpc.inside.records import Format
from hpc.inside.table import Table


@dataclass
class Seen:
    """What was seen while reading."""

    records: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    sample: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Reader:
    """Reads files into a table."""

    table: Table
    signatures: Signatures | None
    drops: Drops
    rules: Rules
    form: Format
    workers: Workers
    seen: Seen = field(default_factory=Seen)

    def read(self, number: int, path: Path, left: int | None) -> Iterator[float]:
        """The file's records, or its first `left`. Tells after each piece the share that is read."""
        size, taken, before = path.stat().st_size, 0, self.seen.records
        for judged in self.workers.map(judging.judge, self._tasks(number, path)):
            left = self._take(number, judged, left)
            taken += sum(map(len, judged.lines))
            yield min(1.0, taken / size)
            if left == 0:
                return
        if self.seen.records == before:
            raise UsageError(f"{path} holds no record", hint="check the path, and that the download was complete")

    def finish(self) -> None:
        """No more files come."""
        self.table.finish()
        if self.signatures is not None:
            self.signatures.finish()

    def _tasks(self, number: int, path: Path) -> Iterator[tuple[sources.Piece, Format, Rules] | HpcError]:
        """The file's pieces, read ahead. What can't be read is the last task: it may lie behind what is wanted."""
        form = self.form
        try:
            for piece in sources.pieces(path):
                if form == "auto":  # as the file's first record is, so must be the others
                    form = records.form_of(piece)
                self.drops.units[number] = piece.unit
                yield piece, form, self.rules
        except HpcError as error:
            yield error

    def _take(self, file: int, judged: Judged, left: int | None) -> int | None:
        """Put the first `left` records of a piece into the table; how many may still come."""
        count = len(judged.numbers) if left is None else min(left, len(judged.numbers))
        if judged.error is not None and (left is None or count < left):
            raise judged.error
        kept = 0
        for number, reason in zip(judged.numbers[:count], judged.reasons, strict=False):
            if reason:
                self.drops.record(file, number, reason)
            else:
                kept += 1
        numbers = [n for n, reason in zip(judged.numbers[:count], judged.reasons, strict=False) if not reason]
        self.table.add(file, judged.lines[:kept], numbers, judged.ranks[:kept], judged.digests[:kept])
        if self.signatures is not None:
            self.signatures.add(judged.signatures, kept)
        self.seen.records += count
        self.seen.languages.update(filter(None, judged.languages[:count]))
        self.seen.unanswered += sum(judged.unanswered[:count])
        self.seen.sample = sorted([*self.seen.sample, *judged.sample])[: judging.SAMPLE]
        return None if left is None else left - count


def agreement(seen: Seen, seed: int, workers: Workers) -> dict[str, int]:
    """How often the fast detector and langdetect say the same of a sample."""
    parts = [seen.sample[at : at + 10] for at in range(0, len(seen.sample), 10)]
    same = sum(workers.map(_same, ((part, seed) for part in parts)))
    return {"rows": len(seen.sample), "same": same}


def _same(task: tuple[list[tuple[int, str, str]], int]) -> int:
    part, seed = task
    reference = languages.detector("langdetect", seed)
    return sum(reference(text).partition("-")[0] == language for _, text, language in part)
