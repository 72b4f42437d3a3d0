"""Safetensors files one tensor at a time: read where it lies in the file, written as it comes, no model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hpc.core.errors import HpcError

_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
"""torch's name of a type -> that of the format."""
_NAMES = {short: name for name, short in _TYPES.items()}
INDEX = "model.safetensors.index.json"
_ALIGN = 8
_PIECE = 4 << 20
"""Larger ones come in fresh memory each time, which costs more than what is done with them."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """torch's name: bfloat16, float32, …"""
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def floating(self) -> bool:
        return self.dtype in {"float64", "float32", "float16", "bfloat16"}


def catalogue(file: Path) -> dict[str, Entry]:
    """The tensors of one file, in the order in which they lie there."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {
            name: Entry(
                file=file,
                dtype=_NAMES[one["dtype"]],
                shape=tuple(one["shape"]),
                begin=8 + length + one["data_offsets"][0],
                end=8 + length + one["data_offsets"][1],
            )
            for name, one in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HpcError(f"cannot read {file}: {error or type(error).__name__}", hint="is it a whole file?") from error
    if max((entry.end for entry in found.values()), default=0) > file.stat().st_size:
        raise HpcError(f"{file} is cut off", hint="the download or copy may be incomplete")
    return dict(sorted(found.items(), key=lambda item: item[1].begin))


def shards(folder: Path) -> list[Path]:
    """The files that a model's weights are in."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in dict.fromkeys(sorted(index["weight_map"].values()))]
    except OSError:
        pass
    except (ValueError, KeyError, AttributeError) as error:
        raise HpcError(f"cannot read {folder / INDEX}: {error}", hint="is it a whole file?") from error
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def pieces(entry: Entry) -> Iterator[slice]:
    """The rows of a tensor, so many at a time that they are a few MiB."""
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, _PIECE * rows // max(1, entry.end - entry.begin))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def read(entry: Entry, rows: slice | None = None) -> Any:
    """
    The tensor, or some rows of it, in memory of its own.

    A map of the file would stay in memory as long as any part of it is used.
    """
    import torch

    if rows is None or not entry.shape:
        begin, end, shape = entry.begin, entry.end, entry.shape
    else:
        row = (entry.end - entry.begin) // entry.shape[0]
        begin, end = entry.begin + rows.start * row, entry.begin + rows.stop * row
        shape = (rows.stop - rows.start, *entry.shape[1:])
    data = bytearray(end - begin)
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(begin)
        view, done = memoryview(data), 0
        while done < len(data):
            got = file.readinto(view[done:])
            if not got:
                raise HpcError(f"{entry.file} is cut off", hint="the download or copy may be incomplete")
            done += got
    flat = torch.frombuffer(data, dtype=getattr(torch, entry.dtype)) if data else torch.empty(0)
    return flat.reshape(shape)


class Writer:
    """One file whose tensors' names, types and shapes are known before; they are given in that order."""

    def __init__(self, file: IO[bytes], entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.size = 0
        """Bytes of all tensors."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape) in entries.items():
            begin = self.size
            self.size += _bytes(dtype, shape)
            header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [begin, self.size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN)
        file.write(len(text).to_bytes(8, "little") + text)
        self._file = file
        self._waiting = list(entries.items())

    def add(self, name: str, parts: Iterable[Any]) -> None:
        """A tensor, as its rows come."""
        import torch

        expected, (dtype, shape) = self._waiting.pop(0)
        assert name == expected
        left = _bytes(dtype, shape)
        for tensor in parts:
            assert tensor.dtype == getattr(torch, dtype)
            left -= tensor.numel() * tensor.element_size()
            self._put(tensor)
        assert left == 0, name

    def _put(self, tensor: Any) -> None:
        import torch

        view = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        while view:
            view = view[self._file.write(view) :]

    def copy(self, name: str, entry: Entry) -> None:
        """A tensor as it lies in another file, by the kernel."""
        expected, (dtype, shape) = self._waiting.pop(0)
        assert (name, entry.dtype, entry.shape) == (expected, dtype, shape), name
        with open(entry.file, "rb") as source:
            place = entry.begin
            while place < entry.end:
                done = os.sendfile(self._file.fileno(), source.fileno(), place, min(entry.end - place, 1 << 30))
                if not done:
                    raise HpcError(f"{entry.file} is cut off", hint="the download or copy may be incomplete")
                place += done


@contextmanager
def writing(path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[Writer]:
    """A new safetensors file."""
    with open(path, "wb", buffering=0) as file:
        writer = Writer(file, entries)
        yield writer
    assert not writer._waiting, "every tensor that was announced is written"


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    width = {"bool": 1, "bfloat16": 2}.get(dtype) or int("".join(filter(str.isdigit, dtype.partition("_")[0]))) // 8
    for side in shape:
        width *= side
    return width
