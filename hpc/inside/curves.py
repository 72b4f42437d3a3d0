"""
What a training logs, kept as it comes: lines of JSON for programs, and TensorBoard's own file for a person.

TensorBoard's library would take a second and 100 MB to write a few floats: its file is records of protocol buffers with
a checksum, which the standard library can write. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

FOLDER = "training"
"""In the stage's folder."""
LOG = "log.jsonl"


class Curves:
    """The logs of one attempt; what an earlier one logged after the checkpoint that is resumed is taken out."""

    def __init__(self, folder: Path, resumed: int) -> None:
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG
        kept = [entry for entry in read(self._log) if entry["step"] <= resumed]
        part = self._log.with_suffix(".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(part, self._log)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        self._events = folder / "tensorboard" / name
        self._put(_message(1, now) + _field(3, b"brain.Event:2"))
        if resumed:  # SessionLog.START: TensorBoard forgets what it has of later steps
            self._put(_message(1, now) + _varint_field(2, resumed + 1) + _field(7, _varint_field(1, 1)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"t": round(now, 3), "step": step, **values}) + "\n")
        scalars = b"".join(
            _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", value)) for name, value in values.items()
        )
        self._put(_message(1, now) + _varint_field(2, step) + _field(5, scalars))

    def _put(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        with open(self._events, "ab") as file:
            file.write(length + _checksum(length) + event + _checksum(event))


def read(log: Path) -> list[dict[str, float]]:
    """The entries of a log.jsonl; a last line that was cut off by a kill is left out."""
    entries = []
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def _message(number: int, value: float) -> bytes:
    return bytes([number << 3 | 1]) + struct.pack("<d", value)


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _varint_field(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C, turned and shifted as the format wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
