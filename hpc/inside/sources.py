"""
Files of records -> pieces of about a megabyte, which other processes take apart; memory does not grow with a file.

A file is JSON Lines or one JSON array (either also gzipped), Parquet, or Arrow; a folder stands for all such files
in it. What can't be read is a UsageError with file and line.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hpc.core.errors import UsageError

_PIECE = 1 << 20
_BATCH = 1024
"""Rows of a Parquet or Arrow file in one piece."""
_LONGEST = 64 << 20
"""A single item of a JSON array is no longer than this."""
_BOM = b"\xef\xbb\xbf"
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".json.gz", ".ndjson")
_OF_DATASETS = {
    "dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json",
    "report.json", "dropped.jsonl", "provenance.json",
}  # fmt: skip
"""What lies beside the rows: of the library datasets, of prepare and of generate."""
_READ = {
    "text", "instruction", "input", "output", "context", "response", "prompt", "completion", "system", "history",
    "messages", "conversations", "dialogue", "summary", "log", "original dialog info", "chosen", "rejected",
}  # fmt: skip
"""All keys that are read of a record, or of a preference."""
_COLUMNAR = {".parquet": "Parquet", ".arrow": "Arrow"}


@dataclass(frozen=True)
class Piece:
    """A part of one file, whole records."""

    name: str
    """The file's, for messages to the user."""
    first: int
    """The number of its first line, or row."""
    lines: bytes = b""
    """JSON Lines,"""
    values: list[tuple[int, Any]] = field(default_factory=list)
    """or what was taken apart already, with line or row."""
    unit: str = "line"


class _TwiceError(Exception):
    """A key of an object is there twice, with two values."""


_TWICE = "one of the two would be lost; mend or delete the record"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs) and (twice := next((key for key, value in pairs if made[key] != value), None)):
        raise _TwiceError(f"the key '{twice}' is there twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def files(path: Path) -> list[Path]:
    """The files of records that a path means: itself, or those in the folder, by name. UsageError for none."""
    if not path.is_dir():
        return [path]
    found = [
        p
        for p in sorted(path.rglob("*"))
        if p.is_file()
        and p.name.lower().endswith(SUFFIXES)
        and p.name not in _OF_DATASETS
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    ]
    if not found:
        raise UsageError(f"{path} holds no file of records", hint=f"expected are {', '.join(SUFFIXES)}")
    return found


def pieces(path: Path, limit: int | None = None) -> Iterator[Piece]:
    """The file in pieces, in order. `limit`: only about the first so many bytes of text, whole records."""
    try:
        if kind := columnar(path):
            yield from _rows(path, kind)
            return
        with _opened(path) as file:
            head = file.read(_PIECE).removeprefix(_BOM).lstrip()
        with _opened(path) as file:
            yield from (_array if head.startswith(b"[") else _lines)(file, path.name, limit)
    except (OSError, EOFError, zlib.error) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot read {path}: {said}", hint="check the path, its rights, and that it is whole"
        ) from error


def values(piece: Piece) -> Iterator[tuple[int, Any]]:
    """(line or row, value) of each record in the piece."""
    if not piece.lines:
        yield from piece.values
        return
    for number, line in enumerate(piece.lines.split(b"\n"), piece.first):
        where = f"{piece.name} line {number}"
        text = _utf8(line.removeprefix(_BOM) if number == 1 else line, where).strip()
        if not text:
            continue
        try:
            yield number, _DECODER.decode(text)
        except _TwiceError as error:
            raise UsageError(f"{where}: {error}", hint=_TWICE) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: not valid JSON",
                hint="each line must be one whole JSON object; mend or delete it",
            ) from error


def columnar(path: Path) -> str:
    """Parquet or Arrow, or "" for a file of text."""
    return _COLUMNAR.get(path.suffix.lower(), "")


def looks_whole(path: Path) -> None:
    """UsageError where a Parquet or Arrow file is cut off, by its first and last bytes. Standard library."""
    kind = columnar(path)
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(-min(8, path.stat().st_size), 2)
        tail = file.read()
    stream = kind == "Arrow" and (head[:4] == b"\xff" * 4 or head[:6] == b"ARROW1")
    if not (stream or (kind == "Parquet" and head[:4] == tail[-4:] == b"PAR1")):
        raise UsageError(f"{path} is not a whole {kind} file", hint="was the download or copy complete?")


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _lines(file: IO[bytes], name: str, limit: int | None) -> Iterator[Piece]:
    line, left = 1, limit
    while left is None or left > 0:
        block = file.read(_PIECE if left is None else min(left, _PIECE))
        if not block:
            return
        block += file.readline()
        yield Piece(name, line, lines=block)
        line += block.count(b"\n")
        left = None if left is None else left - len(block)


def _array(file: IO[bytes], name: str, limit: int | None) -> Iterator[Piece]:  # noqa: PLR0915
    """The items of one JSON array, decoded one by one, so that an error has a line and memory does not grow."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, at, line, taken, ended = "", 0, 1, 0, False
    found: list[tuple[int, Any]] = []
    held = 0

    def more() -> bool:
        """Put the next part of the file behind what is left of the text."""
        nonlocal text, at, ended, taken
        data = file.read(_PIECE)
        taken += len(data)
        try:
            text, at = text[at:] + decoder.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}: not UTF-8 text", hint="convert it, e.g. iconv -f latin1 -t utf8") from error
        ended = not data
        return not ended

    def skip(also: str) -> str:
        """Go to the next sign that is neither blank nor one of `also`; the sign, or "" at the file's end."""
        nonlocal at, line
        while True:
            while at < len(text) and (text[at].isspace() or text[at] in also):
                line += text[at] == "\n"
                at += 1
            if at < len(text) or not more():
                return text[at : at + 1]

    skip("")
    at += 1
    while (sign := skip("")) != "]":
        where = f"{name} line {line}"
        if limit is not None and taken - len(text) + at > limit:
            break
        while True:
            try:
                value, end = _DECODER.raw_decode(text, at)
                break
            except _TwiceError as error:
                raise UsageError(f"{where}: {error}", hint=_TWICE) from error
            except (ValueError, RecursionError) as error:
                if not sign or len(text) - at > _LONGEST or not more():
                    raise UsageError(f"{where}: not valid JSON", hint="mend the array near this line") from error
        found.append((line, value))
        held += end - at
        line += text.count("\n", at, end)
        at = end
        if skip("") not in (",", "]"):
            raise UsageError(f"{where}: not valid JSON", hint="mend the array near this line")
        if text[at] == ",":
            at += 1
        if held >= _PIECE:
            yield Piece(name, found[0][0], values=found)
            found, held = [], 0
    if found:
        yield Piece(name, found[0][0], values=found)
    at += 1
    if sign == "]" and skip(""):
        raise UsageError(f"{name}: text follows the JSON array", hint="a file is one array, or one object a line")


def _rows(path: Path, kind: str) -> Iterator[Piece]:
    """The rows of a Parquet or Arrow file."""
    import pyarrow
    from pyarrow import ipc, parquet

    row = 1
    try:
        # read, and not mapped: mapped pages count as memory of ours
        with pyarrow.OSFile(str(path)) as file:
            if kind == "Parquet":
                batches = parquet.ParquetFile(file).iter_batches(_BATCH)
            else:
                stream = file.read(6) != b"ARROW1"
                file.seek(0)
                reader = ipc.open_stream(file) if stream else ipc.open_file(file)
                batches = reader if stream else map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH):
                    found = _taken(batch.slice(start, _BATCH), path.name, row)
                    yield Piece(path.name, row, values=list(enumerate(found, row)), unit="row")
                    row += len(found)
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0][:200]
        raise UsageError(
            f"{path} row {row}: cannot be read: {said}", hint="was the download or copy complete?"
        ) from error


def _taken(batch: Any, name: str, row: int) -> list[Any]:
    """The rows of a batch, whose first has this number; a column that nobody reads may hold what Python has not."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        read = [at for at, column in enumerate(batch.schema.names) if column in _READ]
        if 0 < len(read) < batch.num_columns:
            return _taken(batch.select(read), name, row)
        if batch.num_rows > 1:
            return [value for at in range(batch.num_rows) for value in _taken(batch.slice(at, 1), name, row + at)]
        said = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error}"
        raise UsageError(f"{name} row {row}: {said}", hint="mend the record, or write the file anew") from error


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        form = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        raise UsageError(f"{where}: not UTF-8 text", hint=f"convert it, e.g. iconv -f {form} -t utf8") from error
